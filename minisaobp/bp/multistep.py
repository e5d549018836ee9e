"""More than one step of belief propagation on attention: Eqs. 3-5 with true cavity messages, gradients by hand.

Axis letters: L tokens; i sends, j receives, l has sent to i before; r is the sender's label, k the receiver's.
P, B: (..., L, L). Messages: (..., L, L, L) with axes i, j, k, so an array of them is L times as large as A.

N(i), the tokens that i hears, is every token but i; with `include_self` i as well, with `causal` none after i. From
log-messages u = 0 (uniform), every step sends all messages at once (flooding):

    q_ij(r)  ~  P_i(r) exp(sum of u_li(r) over l in N(i), l != j)     what i believes without having heard j   (Eq. 3)
    t_ij(k)  =  sum_r psi(r, k) q_ij(r)                               what that tells j                        (Eq. 4)
    u_ij(k) <-  (1 - damping) log t_ij(k) + damping u_ij(k)

and after the last one the belief is B_jk ~ P_jk exp(sum of u_ij(k) over i in N(j)) (Eq. 5). Messages are known up to a
factor, which Eqs. 3 and 5 normalise away; damping in logarithms does not see it either, as in `FactorGraph`.

In the first step q_ij is P_i for every j, and the result is that of `refinement.py`. Under `causal`, j is never in N(i)
when i sends to j: nothing is left out, and the belief of token j stays as it is from step j on. All of it is computed
in float64: a sum of many logarithms does not fit into the digits of float32, and beside L x L x L numbers the memory
saved would be small. At the size limit, two steps peak at 1 GB and with their gradient at 2 GB.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..backend import array_namespace

MAX_MESSAGES = 2**24  # numbers in one array of messages: 128 MiB, one matrix of L = 256 or 8 heads of L = 128
MAX_LOG_RATIO = 80.0  # B/P at P = 0 has no upper bound; capped so that a gradient in float32 is finite


class Factor(NamedTuple):
    """psi as what propagation asks of it. Rows of q sum to 1 or are empty; t of an empty row is 1."""

    messages: Callable  # q (..., n, L) -> t (..., n, L) = q psi, up to a constant
    messages_backward: Callable  # dt, q -> dq, and the gradient of the factor's own parameters


class StepsCache(NamedTuple):
    factor: Factor
    damping: float
    P: Any  # (..., L, L) priors, float64
    B: Any  # (..., L, L) beliefs
    ratio: Any  # (..., L, L) B/P
    u: list  # steps + 1 arrays (..., L, L, L): the log-messages before the first step and after each
    sends: Any  # (L, L, 1) booleans: whether i sends to j; an empty row sends 1


def refine_steps(P, factor, steps, damping=0.0, causal=False, include_self=False):
    """Beliefs after `steps` steps, (..., L, L) float64, and a cache. Rows of P sum to 1 or are empty."""
    xp = array_namespace(P)
    L = P.shape[-1]
    if P.size * L > MAX_MESSAGES:
        raise ValueError(
            f"steps: with steps={steps}, damping={damping:g} the messages of {P.size // L**2} matrices of {L} tokens "
            f"are {P.size * L} numbers, more than {MAX_MESSAGES}; pass fewer matrices at a time, shorter ones, or "
            "steps=1 without damping, which needs no such array"
        )
    P = P.astype(np.float64)
    i, j = xp.arange(L)[:, None], xp.arange(L)
    sends = (((i < j) if causal else (i != j)) | (include_self & (i == j)))[..., None]
    u = [xp.zeros((*P.shape, L))]
    for _ in range(steps):
        q, _ = _cavities(P, u[-1])
        u.append(xp.where(sends, (1 - damping) * xp.log(_send(factor, q)) + damping * u[-1], 0))
    B, ratio = normalised_in_logs(P, xp.sum(u[-1], axis=-3))
    return B, StepsCache(factor, damping, P, B, ratio, u, sends)


def refine_steps_backward(dB, cache):
    """Gradient of `refine_steps`: dP (..., L, L) and that of the factor's parameters, in float64.

    Only the log-messages were kept; q and t of each step are computed again from them.
    """
    xp = array_namespace(dB)
    factor, damping, P, B, ratio, u, sends = cache
    # B_jk = P_jk exp(sum_i u_ijk) / Z_j
    centred = dB - xp.sum(dB * B, axis=-1, keepdims=True)
    dP = ratio * centred
    du = (B * centred)[..., None, :, :]  # the same for every i
    dpsi = 0.0
    for before in u[-2::-1]:
        q, ratio = _cavities(P, before)
        # u_ijk = (1 - damping) log t_ijk + damping before_ijk where i sends to j, else 0
        du = xp.where(sends, du, 0)
        # t = q psi
        dt = (1 - damping) * du / _send(factor, q)
        dq, dpsi_of_step = factor.messages_backward(_as_rows(dt), _as_rows(q))
        dpsi = dpsi + dpsi_of_step
        # q_ijr = P_ir exp(evidence_ijr) / Z_ij
        dq = dq.reshape(q.shape)
        centred = dq - xp.sum(dq * q, axis=-1, keepdims=True)
        dP += xp.sum(ratio * centred, axis=-2)
        devidence = q * centred
        # evidence_ijr = sum_l before_lir - before_jir
        du = damping * du + xp.sum(devidence, axis=-2)[..., None, :, :] - xp.swapaxes(devidence, -3, -2)
    return dP, dpsi


def normalised_in_logs(P, C):
    """P exp(C), every row normalised, and its ratio to P, which is finite also where P = 0. Computed in float64.

    Nothing can underflow unseen: the largest term of every row is 1 before the row is normalised. A row of zeros stays.
    """
    xp = array_namespace(P)
    held = P > 0
    l = xp.where(held, xp.log(xp.where(held, P, 1).astype(np.float64)) + C, -np.inf)
    shift = xp.max(l, axis=-1, keepdims=True)
    shift = xp.where(shift > -np.inf, shift, 0)
    B = xp.exp(l - shift)
    Z = xp.sum(B, axis=-1, keepdims=True)
    Z = xp.where(Z > 0, Z, 1)
    return B / Z, xp.exp(xp.minimum(C - shift - xp.log(Z), MAX_LOG_RATIO))


def check_steps(steps, damping):
    """Raises ValueError unless steps is an integer >= 1 and damping a number in [0, 1)."""
    if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"steps: expected an integer >= 1, got {steps!r}")
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real) or not 0 <= damping < 1:
        raise ValueError(f"damping: expected a number in [0, 1), got {damping!r}")


def _cavities(P, u):
    """q_ij, and q_ij / P_i, both (..., L, L, L): the prior and all that i was told, except by j."""
    xp = array_namespace(P)
    evidence = xp.sum(u, axis=-3)[..., :, None, :] - xp.swapaxes(u, -3, -2)  # who was not heard has u = 0
    return normalised_in_logs(P[..., :, None, :], evidence)


def _send(factor, q):
    return factor.messages(_as_rows(q)).reshape(q.shape)


def _as_rows(q):
    """(..., L, L, L) as (..., L * L, L): the factor acts on the last axis, its parameters vary over the leading."""
    return q.reshape(*q.shape[:-3], math.prod(q.shape[-3:-1]), q.shape[-1])
