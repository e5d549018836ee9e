"""Multi-head self-attention (Eq. 1) whose attention matrix is refined by belief propagation before it mixes values.

Axis letters: B batch, H heads, L tokens (query j, key k), E head width, D = H E model width.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import cuda
from ..backend import array_namespace
from ..bp.refinement import (
    MAX_LAM,
    RefinementCache,
    refine_rows,
    refine_rows_backward,
    sum_to_shape,
    visible_entries,
)
from .ops import SoftmaxCache, dropout, dropout_backward, softmax, softmax_backward


def lam_of_layer(learned, fixed):
    """lambda as `attention` takes it: the learned one, (1,) or (H,), as (.., 1, 1) and within bounds, or the fixed."""
    return fixed if learned is None else learned.clip(-MAX_LAM, MAX_LAM).reshape(-1, 1, 1)


def lam_of_layer_backward(dlam, learned):
    """Gradient of the learned lambda, (1,) or (H,): none beyond the bounds."""
    return dlam.reshape(-1) * (abs(learned) <= MAX_LAM)


class RefinedSoftmaxCache(NamedTuple):
    P: Any  # (B, H, L, L) the softmax
    refinement: Any  # RefinementCache; None for the variant "original"


def refined_softmax(scores, lam, variant, valid=None, causal=False):
    """Attention, refined, from scores (B, H, L, L), which may be written to; arguments as of `attention`."""
    xp = array_namespace(scores)
    refined = variant != "original"
    if xp is not np and variant in ("high", "low"):
        P, B = cuda.refined_softmax(scores, valid, -lam if variant == "low" else lam, causal)
        return B, RefinedSoftmaxCache(P, RefinementCache(variant, lam, causal, False, P, B, None, None, None))
    if xp is not np:
        P = cuda.softmax_rows(scores, valid, causal, refined)
    else:
        if causal:
            scores += np.where(np.tri(scores.shape[-1], dtype=bool), 0, -np.inf).astype(scores.dtype)
        if valid is not None:
            padding = np.where(valid, 0, -np.inf).astype(scores.dtype)
            scores += padding[:, None, None, :]
            if refined:
                scores += padding[:, None, :, None]
        P, _ = softmax(scores)
    if not refined:
        return P, RefinedSoftmaxCache(P, None)
    visible = None  # only BP-ElemMul gives weight back to what the softmax has masked
    if variant == "elemmul":
        visible = visible_entries(scores, causal, None if valid is None else valid[:, None])
    A, cache = refine_rows(P, lam, variant, causal=causal, visible=visible)
    return A, RefinedSoftmaxCache(P, cache)


def refined_softmax_backward(dA, cache):
    """dA (B, H, L, L) -> dscores, and dlam in the shape of lam; None for "original" and for a fixed number."""
    refinement, dlam, gpu = cache.refinement, None, array_namespace(dA) is not np
    if refinement is not None and gpu and refinement.variant != "elemmul":
        sign = -1 if refinement.variant == "low" else 1
        ds, dlam = cuda.refined_softmax_backward(
            dA, refinement.B, cache.P, sign * refinement.lam, refinement.causal, refinement.include_self
        )
        return ds, None if dlam is None else sum_to_shape(sign * dlam, refinement.lam.shape)
    if refinement is not None:
        dA, dlam = refine_rows_backward(dA, refinement)
        dlam = dlam if np.ndim(refinement.lam) else None
    return softmax_backward(dA, SoftmaxCache(cache.P)), dlam


def product(a, b, transpose_a=False, transpose_b=False):
    """a @ b of two stacks of matrices, either transposed; CuPy would first copy what is transposed."""
    if array_namespace(a) is not np:
        return cuda.product(a, b, transpose_a, transpose_b)
    return (a.swapaxes(-1, -2) if transpose_a else a) @ (b.swapaxes(-1, -2) if transpose_b else b)


class AttentionCache(NamedTuple):
    q: Any  # (B, H, L, E), scaled by 1/sqrt(E)
    k: Any  # (B, H, L, E)
    v: Any  # (B, H, L, E)
    A: Any  # (B, H, L, L) attention after refinement and dropout
    refined: Any  # of refined_softmax
    dropout: Any


def attention(qkv, lam, variant, valid=None, causal=False, rate=0.0, rng=None):
    """Mixed values and the attention that mixed them: qkv (B, L, 3, H, E) -> (B, L, H, E), A (B, H, L, L), cache.

    lam: a number or (H, 1, 1). valid: (B, L) booleans, False for padding, or None if there is none. Padding is never
    attended to. Refined attention is zero in the rows of padded queries too, for they must send no message; with
    "original" these rows are a softmax like any other, as in other implementations. causal: no token attends to or
    hears a later one (Appendix C). rate: dropout of the refined attention, drawn from rng; A is that before dropout.
    """
    q, k, v = (qkv[:, :, n].transpose(0, 2, 1, 3) for n in range(3))  # views [B, H, L, E]
    q = q * q.dtype.type(1 / math.sqrt(q.shape[-1]))
    scores = product(q, k, transpose_b=True)  # [L, E] @ [E, L] -> [L, L]
    A, refined_cache = refined_softmax(scores, lam, variant, valid, causal)
    used, dropout_cache = dropout(A, rate, rng)
    mixed = product(used, v).transpose(0, 2, 1, 3)  # [L, L] @ [L, E] -> [L, E]
    return mixed, A, AttentionCache(q, k, v, used, refined_cache, dropout_cache)


def attention_backward(dmixed, cache):
    """dmixed (B, L, H, E) -> dqkv (B, L, 3, H, E), dlam as of `refined_softmax_backward`."""
    q, k, v, A = cache.q, cache.k, cache.v, cache.A
    xp = array_namespace(dmixed)
    dmixed = dmixed.transpose(0, 2, 1, 3)
    B, H, L, E = q.shape
    dqkv = xp.empty((B, L, 3, H, E), dmixed.dtype)
    dq, dk, dv = (dqkv[:, :, n].transpose(0, 2, 1, 3) for n in range(3))
    # mixed = A v
    dA = product(dmixed, v, transpose_b=True)
    dv[...] = product(A, dmixed, transpose_a=True)
    dA = dropout_backward(dA, cache.dropout)
    ds, dlam = refined_softmax_backward(dA, cache.refined)
    # scores = (q / sqrt(E)) k^T; q is cached scaled
    dq[...] = product(ds, k) * q.dtype.type(1 / math.sqrt(E))
    dk[...] = product(ds, q, transpose_a=True)
    return dqkv, dlam
