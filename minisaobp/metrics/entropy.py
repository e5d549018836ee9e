"""Eq. 2: how spread out attention is.

Axis letters: L tokens, row j of A is what token j attends to.
"""

import numpy as np

from ..backend import array_namespace, attention_array, row_dot, valid_array


def row_entropy(A):
    """-sum_k A_jk log A_jk of every row, in nats; (..., L, L) -> (..., L). 0 log 0 counts as 0.

    >>> row_entropy(np.array([[1.0, 0.0], [0.5, 0.5]])).round(6)
    array([0.      , 0.693147])
    """
    xp = array_namespace(A)
    logs = xp.log(xp.maximum(A, np.finfo(A.dtype).tiny))  # at A = 0 a finite number, which counts for nothing
    return 0.0 - row_dot(A, logs)[..., 0]  # 0.0 - x: never a printed -0


def mean_over_rows(values, valid=None):
    """Mean of (..., L) over the valid tokens; (...,). NaN where a sequence has none."""
    xp = array_namespace(values)
    if valid is None:
        return values.mean(axis=-1)
    valid = xp.broadcast_to(valid, values.shape)
    count = valid.sum(axis=-1)
    return xp.where(count > 0, xp.sum(xp.where(valid, values, 0), axis=-1) / xp.maximum(count, 1), np.nan)


def attention_entropy(A, *, valid=None):
    """Eq. 2: attention entropy in nats, averaged over the rows; shape A.shape[:-2].

    A: (..., L, L), rows are distributions; valid: (..., L) booleans, False for padding, whose rows do not count.
    float16 is computed in float32. Raises ValueError or TypeError on what is not an attention matrix.

    >>> float(attention_entropy(np.full((4, 4), 0.25)).round(6))      # log 4
    1.386294
    """
    A = attention_array(A)
    valid = valid_array(valid, A)
    A = A.astype(np.float32) if A.dtype == np.float16 else A
    return mean_over_rows(row_entropy(A), valid)
