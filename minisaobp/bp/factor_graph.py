"""Eqs. 3-5: belief propagation on any pairwise factor graph, in explicit loops, and the exact answer beside it.

Letters: u, v variables; f = (u, v) the factor between them; r the sender's state, k the receiver's.

A graph has a prior phi_v(k) for every variable and a table psi_f(r, k) for every factor; its joint distribution is
the product of them all. One step of flooding sends every message once, first from the variables, then from the factors:

    Eq. 3   m_{v->f}(k) = phi_v(k) * prod of m_{g->v}(k) over the factors g at v other than f
    Eq. 4   m_{f->v}(k) = sum_r psi_f(r, k) m_{u->f}(r)              f = (u, v); "max" puts a maximum for the sum
    Eq. 5   b_v(k)      = phi_v(k) * prod of m_{f->v}(k) over the factors f at v

On a tree this ends at the exact marginals (with "max": at the max-marginals, whose largest states are the most
probable joint state); on a graph with loops it approximates them. The code works in logarithms, where a product is a
sum and many small messages do not underflow. The sum of Eq. 4 is then `logaddexp` and the maximum stays `maximum`;
that one operation, which also normalises, is all that tells sum-product from max-product (known in logs as min-sum).

The paper's graph is complete: one variable per token, with the tokens as its states, its attention row as its prior
(Eq. 8) and the same factor between any two. There a first step from uniform messages is Algorithm 1, because then
m_{v->f} is the prior. This module is meant for reading and for small graphs: a step of the paper's graph costs
about L^4 microseconds.
"""

import itertools
import math
import numbers
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..backend import attention_array, to_host

MAX_JOINT_STATES = 2**24  # what exact_marginals enumerates: eight tokens with eight labels, 128 MiB
ASYMMETRY = 1e-6  # of a factor beside its largest entry; less is the rounding of a symmetric float32 matrix
PLUS = {"sum": np.logaddexp, "max": np.maximum}  # in logarithms


class Flooding(NamedTuple):
    """What `FactorGraph.run` returns. With mode "sum" every array sums to 1, with "max" its largest entry is 1."""

    beliefs: dict  # variable -> (states,), Eq. 5; all zero for a variable that is absent
    residuals: np.ndarray  # (steps,): in each step, the largest change of an entry of a factor's message (Eq. 4)
    messages: dict  # (sender, receiver) -> (states,), the last step's: (v, f) by Eq. 3, (f, v) by Eq. 4


class FactorGraph:
    """A pairwise factor graph: variables with priors, and factors that each join two of them (section 3).

    priors: {name: prior}, each a vector of numbers >= 0, one per state; names are any hashable values. Only the
        proportions of a prior matter. A prior of zeros makes the variable absent: its factors are dropped, so it sends
        nothing, and its belief stays zero.
    factors: {(u, v): table}, at most one per pair, each of numbers >= 0 and shape (states of u, states of v).

    Zeros are allowed. If they forbid every joint state, `run` (where messages can notice) and `exact_marginals`
    (always) raise ValueError. Inputs are copied to float64 and never written to; all results are float64.
    Raises TypeError or ValueError that names the argument, what was given and what was expected.

    >>> graph = FactorGraph({"rain": [0.2, 0.8], "wet": [0.5, 0.5]}, {("rain", "wet"): [[0.9, 0.1], [0.3, 0.7]]})
    >>> flooding = graph.run(2)
    >>> flooding.beliefs["wet"]                                 # a tree: 0.2 * 0.9 + 0.8 * 0.3 = 0.42, exactly
    array([0.42, 0.58])
    >>> for (sender, receiver), message in flooding.messages.items():
    ...     print(sender, "->", receiver, message)
    rain -> ('rain', 'wet') [0.2 0.8]
    wet -> ('rain', 'wet') [0.5 0.5]
    ('rain', 'wet') -> rain [0.5 0.5]
    ('rain', 'wet') -> wet [0.42 0.58]
    """

    def __init__(self, priors, factors):
        for name, value in (("priors", priors), ("factors", factors)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{name}: expected a dict, got {type(value).__name__}")
        self.priors = {v: _table(prior, f"priors[{v!r}]", axes=1) for v, prior in priors.items()}
        self.present = [v for v, prior in self.priors.items() if prior.any()]
        self.factors = {}
        for f, table in factors.items():
            if not (isinstance(f, tuple) and len(f) == 2 and f[0] != f[1] and all(v in self.priors for v in f)):
                raise ValueError(f"factors: expected pairs of two variables of the graph as keys, got {f!r}")
            if (f[1], f[0]) in factors:
                raise ValueError(f"factors: expected one table per pair, got both {f!r} and {(f[1], f[0])!r}")
            table = _table(table, f"factors[{f!r}]", axes=2)
            states = tuple(len(self.priors[v]) for v in f)
            if table.shape != states:
                raise ValueError(f"factors[{f!r}]: expected shape {states}, the states of the two, got {table.shape}")
            if all(v in self.present for v in f):
                self.factors[f] = table
        self.factors_at = {v: [f for f in self.factors if v in f] for v in self.present}

    @classmethod
    def from_attention(cls, A, factor):
        """The paper's graph: token i is variable i with prior A[i] (Eq. 8), and `factor` joins every two tokens.

        A: (L, L), floating point, >= 0; a row of zeros is an absent token. factor: (L, L) psi[r, k], floating point,
        >= 0 and symmetric, such as `bp_high(lam, L)`.

        Why symmetric: a factor is one table that both its variables read. If i sends A[i] @ psi to j, then j sends
        A[j] @ psi.T to i. The rule "everyone sends its row @ psi" with an asymmetric psi therefore belongs to no
        joint distribution of all the tokens; each of its rows does to one, that of the star around j with factors
        {(i, j): psi for every i != j}. A graph with directions of your own choice is `FactorGraph(priors, factors)`.

        >>> from minisaobp import algorithm1
        >>> from minisaobp.bp import bp_high
        >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
        >>> beliefs = FactorGraph.from_attention(A, bp_high(0.2, 2)).run(1).beliefs
        >>> np.allclose(list(beliefs.values()), algorithm1(A, 0.2), rtol=0, atol=1e-12)
        True
        """
        A, factor = to_host(attention_array(A)), to_host(attention_array(factor, "factor"))
        if A.ndim != 2:
            raise ValueError(f"A: expected one matrix of shape (L, L), got {A.shape}")
        if factor.shape != A.shape:
            raise ValueError(f"factor: expected the shape of A, {A.shape}, got {factor.shape}")
        if np.max(abs(factor - factor.T)) > ASYMMETRY * np.max(factor):
            raise ValueError(f"factor: expected a symmetric matrix, since both tokens read it, got one of {A.shape}")
        return cls(dict(enumerate(A)), dict.fromkeys(itertools.combinations(range(len(A)), 2), factor))

    def run(self, steps, mode="sum", damping=0.0):
        """Flooding from uniform messages: in each step every message of Eq. 3, then every message of Eq. 4.

        steps: an integer >= 0; a tree is exact once steps reach its diameter. mode: "sum" for sum-product, "max" for
        max-product. damping: in [0, 1), the share of a factor's old message that is kept, in logarithms:
        m_new^(1 - damping) * m_old^damping. So it does not depend on how messages are normalised, and it slows the
        first step too, whose old message is the uniform one.

        Returns `Flooding`: beliefs, residuals of all the steps, and the last messages (none if steps is 0).

        >>> like = np.array([[2.0, 1.0], [1.0, 2.0]])
        >>> chain = FactorGraph({"a": [3, 1], "b": [1, 1], "c": [1, 1]}, {("a", "b"): like, ("b", "c"): like})
        >>> chain.run(3).residuals.round(4)                     # a's news takes two steps to reach c
        array([0.0833, 0.0278, 0.    ])
        >>> chain.run(3, mode="max").beliefs["c"]               # all in state 0 is twice as probable as any with c in 1
        array([1. , 0.5])
        """
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 0:
            raise ValueError(f"steps: expected an integer >= 0, got {steps!r}")
        _check_mode(mode)
        if not isinstance(damping, numbers.Real) or not 0 <= damping < 1:
            raise ValueError(f"damping: expected a number in [0, 1), got {damping!r}")
        plus = PLUS[mode]
        log_priors = {v: _log(prior) for v, prior in self.priors.items()}
        log_factors = {f: _log(table) for f, table in self.factors.items()}
        ends = [(v, f) for f in self.factors for v in f]
        from_variables = {}
        from_factors = {(f, v): _normalised(np.zeros(len(self.priors[v])), plus, (f, v)) for v, f in ends}
        residuals = np.zeros(steps)
        for step in range(steps):
            for v, f in ends:  # Eq. 3
                message = log_priors[v]
                for g in self.factors_at[v]:
                    if g != f:
                        message = message + from_factors[g, v]
                from_variables[v, f] = _normalised(message, plus, (v, f))
            for v, f in ends:  # Eq. 4
                u, psi = (f[0], log_factors[f]) if v == f[1] else (f[1], log_factors[f].T)  # u sends: psi[r, k]
                message = np.full(len(self.priors[v]), -np.inf)
                for k in range(len(self.priors[v])):
                    for r in range(len(self.priors[u])):
                        message[k] = plus(message[k], psi[r, k] + from_variables[u, f][r])
                old = from_factors[f, v]
                if damping:
                    message = (1 - damping) * message + damping * old
                message = _normalised(message, plus, (f, v))
                residuals[step] = max(residuals[step], np.max(abs(np.exp(message) - np.exp(old))))
                from_factors[f, v] = message
        beliefs = {v: np.zeros(len(prior)) for v, prior in self.priors.items()}
        for v in self.present:  # Eq. 5
            belief = log_priors[v]
            for f in self.factors_at[v]:
                belief = belief + from_factors[f, v]
            beliefs[v] = np.exp(_normalised(belief, plus, v))
        messages = from_variables | from_factors if steps else {}
        return Flooding(beliefs, residuals, {pair: np.exp(message) for pair, message in messages.items()})

    def exact_marginals(self, mode="sum"):
        """The marginals that Eq. 5 approximates, {name: (states,)}, by going through every joint state.

        mode "max" gives the max-marginals, the probability of the best joint state with v in state k, relative to the
        best of all: where the largest entries are unique they are the most probable joint state. Scaled as in
        `Flooding`; an absent variable has zeros. Raises ValueError above 2**24 joint states, and if none is possible.

        >>> FactorGraph.from_attention(np.eye(3), np.ones((3, 3)) - np.eye(3)).exact_marginals()[1]
        array([0., 1., 0.])
        """
        _check_mode(mode)
        shape = [len(self.priors[v]) for v in self.present]
        if math.prod(shape) > MAX_JOINT_STATES:
            raise ValueError(f"joint states: expected at most {MAX_JOINT_STATES} to enumerate, got {math.prod(shape)}")
        state = dict(zip(self.present, np.indices(shape, sparse=True), strict=True))  # one axis of `joint` per variable
        joint = np.zeros(shape)  # its logarithm, first
        for v in self.present:
            joint += _log(self.priors[v])[state[v]]
        for (u, v), table in self.factors.items():
            joint += _log(table)[state[u], state[v]]
        best = np.max(joint)
        if best == -np.inf:
            raise ValueError("exact_marginals: the zeros of the priors and factors forbid every joint state")
        joint -= best
        np.exp(joint, out=joint)
        add = np.sum if mode == "sum" else np.max
        marginals = {v: np.zeros(len(prior)) for v, prior in self.priors.items()}
        for axis, v in enumerate(self.present):
            marginals[v] = add(joint, axis=tuple(a for a in range(len(shape)) if a != axis)) / add(joint)
        return marginals


def _normalised(message, plus, what):
    """The log message (or belief) with its states summing to 1, or its largest at 1, whichever `plus` means."""
    total = plus.reduce(message)
    if total == -np.inf:
        raise ValueError(f"run: the zeros of the priors and factors forbid every state at {what!r}")
    return message - total


def _log(x):
    return np.log(x, out=np.full_like(x, -np.inf), where=x > 0)


def _check_mode(mode):
    if mode not in tuple(PLUS):
        raise ValueError(f"mode: expected 'sum' or 'max', got {mode!r}")


def _table(values, name, axes):
    """A float64 copy with the given number of axes: finite numbers >= 0, at least one per axis."""
    try:
        table = to_host(values)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected an array of numbers, got {type(values).__name__}") from None
    if table.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got {table.dtype} of shape {table.shape}")
    if table.ndim != axes or not table.size:
        raise ValueError(f"{name}: expected {axes} axes and at least one entry, got shape {table.shape}")
    table = table.astype(np.float64)
    if not (table.min() >= 0 and table.max() < np.inf):  # a NaN fails the first comparison
        raise ValueError(f"{name}: expected finite values >= 0, got {table.tolist()}")
    return table
