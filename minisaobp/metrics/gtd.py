"""Eqs. 12-14: indirect attention, Global Token Dependency (GTD) and indirect entropy.

Axis letters: L tokens. A^t holds the paths of t hops through the attention graph.

Every idempotent A (A A = A) has the same GTD, 2.439^2 / (1 + 2.439^2) = 0.856 at beta = 0.9 and K = 4: the identity,
the uniform matrix and the collapse onto one token. So a GTD says nothing about collapse by itself. Read it together
with the indirect entropy, which is 0, log L and 0 for these three.
"""

import math
import numbers

import numpy as np

from ..backend import array_namespace, attention_array, valid_array
from .entropy import mean_over_rows, row_entropy


def indirect_attention(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 12: G = sum over t = 2..K of beta^(t-1) A^t, with K = hops; shape and dtype of A, (..., L, L).

    valid: (..., L) booleans, False for padding: paths neither start at, end at nor pass through padded tokens.
    Raises ValueError or TypeError on what is not an attention matrix, beta <= 0 or hops < 2.

    >>> float(indirect_attention(np.eye(3))[0, 0].round(6))            # 0.9 + 0.81 + 0.729
    2.439
    """
    A, dtype, _ = _prepare(A, beta, hops, valid)
    return _indirect(A, beta, hops).astype(dtype, copy=False)


def gtd(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 13: Global Token Dependency, ||G||^2 / (||A||^2 + ||G||^2) in Frobenius norms; shape A.shape[:-2].

    The share of the attention graph's energy that sits in paths of two and more hops, in [0, 1). Arguments and errors
    as `indirect_attention`. NaN for a matrix of zeros.

    >>> [float(gtd(M).round(6)) for M in (np.eye(4), np.full((4, 4), 0.25), np.eye(4)[[1, 2, 3, 0]])]
    [0.856089, 0.856089, 0.666393]
    """
    A, _, _ = _prepare(A, beta, hops, valid)
    xp = array_namespace(A)
    G = _indirect(A, beta, hops)
    direct, indirect = xp.sum(A * A, axis=(-2, -1)), xp.sum(G * G, axis=(-2, -1))
    return xp.where(direct > 0, indirect / xp.where(direct > 0, direct + indirect, 1), np.nan)


def indirect_entropy(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 14: mean row entropy, in nats, of G with its rows normalised; shape A.shape[:-2].

    Arguments and errors as `indirect_attention`; rows of padded tokens do not count.

    >>> [float(indirect_entropy(M).round(6)) for M in (np.eye(4), np.full((4, 4), 0.25))]
    [0.0, 1.386294]
    """
    A, _, valid = _prepare(A, beta, hops, valid)
    xp = array_namespace(A)
    G = _indirect(A, beta, hops)
    mass = xp.sum(G, axis=-1, keepdims=True)
    return mean_over_rows(row_entropy(G / xp.where(mass > 0, mass, 1)), valid)


def _indirect(A, beta, hops):
    # Horner: G = beta A (A + beta A (A + ...)), one product per hop
    G = A
    for _ in range(hops - 2):
        G = A + beta * (A @ G)
    return beta * (A @ G)


def _prepare(A, beta, hops, valid):
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number > 0, got {beta!r}")
    if isinstance(hops, bool) or not isinstance(hops, numbers.Integral) or hops < 2:
        raise ValueError(f"hops: expected a whole number >= 2, got {hops!r}")
    A = attention_array(A)
    valid = valid_array(valid, A)
    dtype = A.dtype
    A = A.astype(np.float32) if dtype == np.float16 else A
    if valid is not None:
        A = A * (valid[..., :, None] & valid[..., None, :])
    return A, dtype, valid
