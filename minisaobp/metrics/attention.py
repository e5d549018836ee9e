"""What else one asks of attention: how sparse it is, where it goes, and which kind of head it makes.

Axis letters: L tokens; row j of A is what token j attends to.
"""

import math
import numbers

import numpy as np

from ..backend import array_namespace, attention_array, to_host, valid_array
from .entropy import mean_over_rows, row_entropy

SPARSE = 1e-3  # below it an entry counts as none; uniform attention has such entries from L = 1000 on only
SINK_SHARE, DIFFUSE_ENTROPY, LOCAL_SHARE = 0.5, 0.9, 0.5
REGIMES = ("sink", "diffuse", "local", "mixed")


def sparsity(A, threshold=SPARSE, *, valid=None, causal=False):
    """Share of the entries of A below a threshold; shape A.shape[:-2], in [0, 1].

    The paper (Appendix E) states no threshold; 1e-3 is ours. Padded tokens do not count (valid: (..., L) booleans), nor
    do the entries above the diagonal of a causal A. Raises ValueError or TypeError on what is not an attention matrix.

    >>> float(sparsity(np.eye(4)))
    0.75
    """
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number > 0, got {threshold!r}")
    A = attention_array(A)
    xp = array_namespace(A)
    counted = _pairs(A, valid_array(valid, A))
    if causal:
        counted = counted & xp.tri(A.shape[-1], dtype=bool)
    count = counted.sum(axis=(-2, -1))
    few = ((threshold > A) & counted).sum(axis=(-2, -1))
    return xp.where(count > 0, few / xp.maximum(count, 1), np.nan)


def column_mass(A, *, valid=None):
    """How much attention each token gets, mean over the rows: (..., L, L) -> (..., L), of sum 1. 0 for padding.

    >>> column_mass(np.array([[0.9, 0.1], [0.7, 0.3]]))
    array([0.8, 0.2])
    """
    A = attention_array(A)
    xp = array_namespace(A)
    both = _pairs(A, valid_array(valid, A))
    rows = both.any(axis=-1).sum(axis=-1)[..., None]
    return xp.sum(xp.where(both, A, 0), axis=-2) / xp.maximum(rows, 1)


def head_features(A, *, valid=None, causal=False):
    """What `regime` judges by, of A (..., L, L): a dict of arrays of shape A.shape[:-2].

    sink: the largest column mass; entropy: attention entropy over that of uniform attention, the mean log of the number
    of tokens that a row may see (causal: up to itself); local: the attention that goes to the token itself and its two
    neighbours, padding between them left out.
    """
    A = attention_array(A)
    xp = array_namespace(A)
    checked = valid_array(valid, A)
    both = _pairs(A, checked)
    L = A.shape[-1]
    place = xp.arange(L) if checked is None else xp.cumsum(checked, axis=-1)
    near = abs(place[..., :, None] - place[..., None, :]) <= 1
    local = mean_over_rows(xp.sum(xp.where(both & near, A, 0), axis=-1), checked)
    visible = (both & xp.tri(L, dtype=bool) if causal else both).sum(axis=-1)
    uniform = mean_over_rows(xp.log(xp.maximum(visible, 1)), checked)
    entropy = mean_over_rows(row_entropy(A), checked) / xp.where(uniform > 0, uniform, 1)
    return {"sink": column_mass(A, valid=valid).max(axis=-1), "entropy": entropy, "local": local}


def regime(features):
    """The kind of each head, a NumPy array of the strings "sink", "diffuse", "local", "mixed".

    The rule, ours, first that holds: sink, one token gets half of all attention or more; diffuse, entropy at least
    0.9 of the uniform one's; local, half of the attention or more stays within one token's distance; else mixed.
    features: of `head_features`, or their means over sequences.

    >>> matrices = np.stack([np.eye(16)[[0] * 16], np.full((16, 16), 1 / 16), np.eye(16)])
    >>> regime(head_features(matrices)).tolist()
    ['sink', 'diffuse', 'local']
    """
    features = {name: to_host(values) for name, values in features.items()}
    rules = [
        features["sink"] >= SINK_SHARE,
        features["entropy"] >= DIFFUSE_ENTROPY,
        features["local"] >= LOCAL_SHARE,
    ]
    return np.select(rules, REGIMES[:3], REGIMES[3])


def _pairs(A, valid):
    """Which entries of A are of two valid tokens, (..., L, L) booleans."""
    xp = array_namespace(A)
    if valid is None:
        return xp.ones(A.shape, bool)
    return xp.broadcast_to(valid[..., :, None] & valid[..., None, :], A.shape)
