"""Multi-head self-attention (Eq. 1) whose attention matrix is refined by belief propagation before it mixes values.

Axis letters: B batch, H heads, L tokens (query j, key k), E head width, D = H E model width.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..backend import array_namespace
from ..bp.refinement import MAX_LAM, refine_rows, refine_rows_backward, visible_entries
from .ops import dropout, dropout_backward, softmax, softmax_backward


def lam_of_layer(learned, fixed):
    """lambda as `attention` takes it: the learned one, (1,) or (H,), as (.., 1, 1) and within bounds, or the fixed."""
    return fixed if learned is None else learned.clip(-MAX_LAM, MAX_LAM).reshape(-1, 1, 1)


def lam_of_layer_backward(dlam, learned):
    """Gradient of the learned lambda, (1,) or (H,): none beyond the bounds."""
    return dlam.reshape(-1) * (abs(learned) <= MAX_LAM)


class AttentionCache(NamedTuple):
    q: Any  # (B, H, L, E), scaled by 1/sqrt(E)
    k: Any  # (B, H, L, E)
    v: Any  # (B, H, L, E)
    A: Any  # (B, H, L, L) attention after refinement and dropout
    softmax: Any
    refinement: Any  # None for the variant "original"
    dropout: Any


def attention(qkv, lam, variant, valid=None, causal=False, rate=0.0, rng=None):
    """Mixed values and the attention that mixed them: qkv (B, L, 3, H, E) -> (B, L, H, E), A (B, H, L, L), cache.

    lam: a number or (H, 1, 1). valid: (B, L) booleans, False for padding, or None if there is none. Padding is never
    attended to. Refined attention is zero in the rows of padded queries too, for they must send no message; with
    "original" these rows are a softmax like any other, as in other implementations. causal: no token attends to or
    hears a later one (Appendix C). rate: dropout of the refined attention, drawn from rng; A is that before dropout.
    """
    xp = array_namespace(qkv)
    q, k, v = (qkv[:, :, n].transpose(0, 2, 1, 3) for n in range(3))  # views [B, H, L, E]
    q = q * q.dtype.type(1 / math.sqrt(q.shape[-1]))
    scores = q @ k.swapaxes(-1, -2)  # [L, E] @ [E, L] -> [L, L]
    visible = visible_entries(scores, causal, None)
    if causal:
        scores += xp.where(visible, 0, -np.inf).astype(scores.dtype)
    if valid is not None:
        padding = xp.where(valid, 0, -np.inf).astype(scores.dtype)
        scores += padding[:, None, None, :]
        if variant != "original":
            scores += padding[:, None, :, None]
            visible = visible_entries(scores, causal, valid[:, None])
    A, softmax_cache = softmax(scores)
    refinement_cache = None
    if variant != "original":
        A, refinement_cache = refine_rows(A, lam, variant, causal=causal, visible=visible)
    used, dropout_cache = dropout(A, rate, rng)
    mixed = (used @ v).transpose(0, 2, 1, 3)  # [L, L] @ [L, E] -> [L, E]
    return mixed, A, AttentionCache(q, k, v, used, softmax_cache, refinement_cache, dropout_cache)


def attention_backward(dmixed, cache):
    """dmixed (B, L, H, E) -> dqkv (B, L, 3, H, E), dlam in the shape of lam (None for "original")."""
    q, k, v, A = cache.q, cache.k, cache.v, cache.A
    xp = array_namespace(dmixed)
    dmixed = dmixed.transpose(0, 2, 1, 3)
    B, H, L, E = q.shape
    dqkv = xp.empty((B, L, 3, H, E), dmixed.dtype)
    dq, dk, dv = (dqkv[:, :, n].transpose(0, 2, 1, 3) for n in range(3))
    # mixed = A v
    dA = dmixed @ v.swapaxes(-1, -2)
    dv[...] = A.swapaxes(-1, -2) @ dmixed
    dA = dropout_backward(dA, cache.dropout)
    dlam = None
    if cache.refinement is not None:
        dA, dlam = refine_rows_backward(dA, cache.refinement)
    ds = softmax_backward(dA, cache.softmax)
    # scores = (q / sqrt(E)) k^T; q is cached scaled
    dq[...] = (ds @ k) * q.dtype.type(1 / math.sqrt(E))
    dk[...] = ds.swapaxes(-1, -2) @ q
    return dqkv, dlam
