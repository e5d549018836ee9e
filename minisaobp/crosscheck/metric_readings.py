"""The same dictionary for the measures: Eqs. 2 and 12-14 and what is known to be computed in their place.

Axis letters: B batch, H heads, L tokens.
"""

import numpy as np

from ..metrics import attention_entropy, gtd, indirect_attention, indirect_entropy
from .readings import Reading

ENTROPIES = ("entropy", "indirect_entropy")
INDIRECT = ("gtd", "indirect_entropy", "indirect_attention")
REFERENCES = {
    "entropy": attention_entropy,
    "gtd": gtd,
    "indirect_entropy": indirect_entropy,
    "indirect_attention": indirect_attention,
}
AXES = {"batch": (0,), "heads": (1,), "batch and heads": (0, 1), "batch, heads and rows": (0, 1, 2)}

METRIC_READINGS = (
    Reading(
        "beta-power",
        "beta^t in place of beta^(t-1)",
        "Eq. 12: G = sum over t = 2..K of beta^(t-1) A^t",
        ({"shift": 0},),
        ("gtd", "indirect_attention"),
    ),
    Reading(
        "from-one",
        "the sum starts at t = 1: the direct attention counts as indirect",
        "Eq. 12: G = sum over t = 2..K of beta^(t-1) A^t",
        ({"start": 1},),
        INDIRECT,
    ),
    Reading(
        "hops-off-by-one",
        "K off by one",
        "Eq. 12: t runs from 2 to K = 4, both included",
        ({"hops": 3}, {"hops": 5}),
        INDIRECT,
    ),
    Reading("beta-left-out", "beta left out", "Eq. 12: beta = 0.9", ({"beta": 1.0},), INDIRECT),
    Reading(
        "entrywise-power",
        "powers of the entries in place of powers of the matrix",
        "Eq. 12: A^t holds the paths of t hops, a matrix power",
        ({"power": "entries"},),
        INDIRECT,
    ),
    Reading(
        "norm-not-squared",
        "the norms are not squared",
        "Eq. 13: GTD = ||G||_F^2 / (||A||_F^2 + ||G||_F^2)",
        ({"squared": False},),
        ("gtd",),
    ),
    Reading(
        "other-norm",
        "another norm: the largest singular value, or the sum of the entries (squared)",
        "Eq. 13 has the Frobenius norm",
        ({"norm": "spectral"}, {"norm": "sum"}),
        ("gtd",),
    ),
    Reading(
        "log-base-2",
        "the logarithm has base 2, or 10: bits in place of nats",
        "Eqs. 2 and 14 have the natural logarithm",
        ({"base": 2.0}, {"base": 10.0}),
        ENTROPIES,
    ),
    Reading(
        "wrong-axes",
        "the mean, or the sum, over the wrong axes",
        "Eqs. 2 and 14: a sum over the keys of a row, a mean over the rows of a matrix; Eq. 13: one number per matrix",
        (
            *({"mean": name} for name in AXES),
            *({"mean": name, "then": "batch and heads"} for name in ("entries", "sum", "rows")),
            {"mean": "entries"},
            {"mean": "sum"},
            {"mean": "none"},
            {"over": "columns"},
            {"over": "matrix"},
        ),
        (*ENTROPIES, "gtd"),
    ),
    Reading(
        "not-normalised",
        "G is not normalised: its rows do not sum to 1",
        "Eq. 14: the entropy of G with its rows normalised",
        ({"over": "nothing"},),
        ("indirect_entropy",),
    ),
    Reading(
        "sign", "the sign: sum of p log p without the minus", "Eq. 2: H = -sum p log p", ({"sign": -1},), ENTROPIES
    ),
    Reading(
        "padding-counts",
        "padded rows count like any other",
        "Eqs. 2 and 12-14 are of the tokens of the sequence",
        ({"padding": True},),
        ("entropy", *INDIRECT),
    ),
)


def known(what):
    return [r for r in METRIC_READINGS if what in r.variants]


def reference(case):
    return np.asarray(REFERENCES[case.what](case.A, valid=case.valid))


def measured(
    case,
    *,
    shift=1,
    start=2,
    hops=4,
    beta=0.9,
    power="matrix",
    squared=True,
    norm="Frobenius",
    base=np.e,
    mean="rows",
    then=None,
    over="rows",
    sign=1,
    padding=False,
):
    """What a reading makes of a case: any shape."""
    A = case.A
    valid = np.ones(A.shape[:-1], bool) if case.valid is None or padding else np.broadcast_to(case.valid, A.shape[:-1])
    A = A * (valid[..., :, None] & valid[..., None, :])
    if case.what == "entropy":
        return _averaged(sign * _entropies(A, base, over if over != "rows" else "nothing"), valid, mean, then)
    G, path = np.zeros_like(A), A
    for t in range(1, hops + 1):
        if t > 1:
            path = path @ A if power == "matrix" else path * A
        if t >= start:
            G = G + beta ** (t - shift) * path
    if case.what == "indirect_attention":
        return G
    if case.what == "indirect_entropy":
        return _averaged(sign * _entropies(G, base, over), valid, mean, then)
    axes = AXES.get(mean, ())
    if norm == "Frobenius":
        within = {"columns": (-2,), "matrix": (-1, -2, -3)}.get(
            over, (-1,) if mean in ("none", "entries") else (-1, -2)
        )
        energies = [(x * x).sum(within) for x in (A, G)]
    else:
        energies = [np.linalg.norm(x, 2, (-2, -1)) ** 2 if norm == "spectral" else x.sum((-1, -2)) ** 2 for x in (A, G)]
    if len(axes) in (2, 3):  # one number for the whole batch: of all energies together
        energies = [x.sum() for x in energies]
    direct, indirect = energies if squared else map(np.sqrt, energies)
    with np.errstate(invalid="ignore"):
        share = indirect / (direct + indirect)
    return share.mean(axes) if len(axes) == 1 else share.mean((0, 1)) if then else share


def _entropies(P, base, over):
    """-sum of p log p, (B, H, L), along rows or columns, normalised or not."""
    if over == "rows":
        P = P / _or_one(P.sum(-1, keepdims=True))
    elif over == "columns":
        P = P.swapaxes(-1, -2) / _or_one(P.sum(-2)[..., None])
    elif over == "matrix":
        P = P / _or_one(P.sum((-1, -2), keepdims=True))
    return -(P * np.log(np.where(P > 0, P, 1))).sum(-1) / np.log(base)


def _averaged(rows, valid, mean, then):
    """Means of (B, H, L)."""
    rows = np.where(valid, rows, 0)
    count = valid.sum(-1)
    if mean in AXES:
        return rows.mean(AXES[mean])
    if mean == "none":
        return rows
    result = rows.sum(-1) / {"rows": count, "sum": 1, "entries": count**2}[mean]
    return result.mean((0, 1)) if then else result


def _or_one(x):
    return np.where(x > 0, x, 1)
