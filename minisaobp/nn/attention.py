"""Multi-head self-attention (Eq. 1) whose attention matrix is refined by belief propagation before it mixes values.

Beside the refined variants stand simplified ones, each of which gives up one principle of attention. The principles are
those of *Deconstructing Attention* (Xue, Moosavi & Aletras, arXiv 2510.11602); where its form of one is another, it is
named here. Rows of all of them are distributions over the tokens that may be seen, so every measure takes them.

    none      nothing is mixed: A is the identity, each token keeps its own value (theirs: a gated feed-forward layer)
    uniform   no scores: every key that may be seen gets the same share
    fixed     the softmax of learned scores, one for each head and pair of positions, the same for every sequence
              (theirs: queries and keys of one fixed text, or of random embeddings, that goes through the model)
    static    queries and keys come from the embeddings, not from the layer's state
    linear    A_jk = phi(q_j) phi(k_k) over its row sum, phi = ELU + 1, in place of the softmax (Katharopoulos et al.,
              arXiv 2006.16236; theirs: a Taylor expansion of the exponential)

Axis letters: B batch, H heads, L tokens (query j, key k), E head width, D = H E model width, P positions.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import cuda
from ..backend import array_namespace, row_dot, row_sum
from ..bp.refinement import (
    MAX_LAM,
    VARIANTS,
    RefinementCache,
    refine_rows,
    refine_rows_backward,
    sum_to_shape,
    visible_entries,
)
from .ops import SoftmaxCache, dropout, dropout_backward, linear, linear_backward, softmax, softmax_backward

REFINED = VARIANTS[1:]  # all but "original"


def own_of_layer(parameters, lam):
    """What `attention` takes as its own, of a layer's parameters under the names of `Config.own_shapes`: the scores of
    "fixed", (H, P, P); the learned lambda, (1,) or (H,), as (.., 1, 1) and within bounds; or else the fixed `lam`.
    """
    if "scores" in parameters:
        return parameters["scores"]
    return parameters["lam"].clip(-MAX_LAM, MAX_LAM).reshape(-1, 1, 1) if "lam" in parameters else lam


def own_of_layer_backward(down, parameters, gradients):
    """Its gradient, as `attention_backward` gives it, into the layer's: none of a lambda beyond the bounds."""
    if "scores" in gradients:
        gradients["scores"][...] = down
    if "lam" in gradients:
        gradients["lam"][...] = down.reshape(-1) * (abs(parameters["lam"]) <= MAX_LAM)


# ---- queries, keys and values ---------------------------------------------------------------------------------------


def project(x, e, W, b):
    """Queries, keys and values side by side by W (n D, D) and b (n D,), of x (B, L, D) -> (B, L, n D), cache.

    e: (B, L, D) embeddings that queries and keys are made from in place of x, for "static"; else None.
    """
    if e is None:
        return linear(x, W, b)
    D = x.shape[-1]
    qk, qk_cache = linear(e, W[:-D], b[:-D])
    v, v_cache = linear(x, W[-D:], b[-D:])
    return array_namespace(x).concatenate([qk, v], axis=-1), (qk_cache, v_cache)


def project_backward(dy, cache):
    """dy (B, L, n D) -> dx, de (None if there was none), dW and db."""
    if not isinstance(cache[0], tuple):
        dx, dW, db = linear_backward(dy, cache)
        return dx, None, dW, db
    qk_cache, v_cache = cache
    D = v_cache.x.shape[-1]
    xp = array_namespace(dy)
    de, dW_qk, db_qk = linear_backward(dy[..., :-D], qk_cache)
    dx, dW_v, db_v = linear_backward(dy[..., -D:], v_cache)
    return dx, de, xp.concatenate([dW_qk, dW_v]), xp.concatenate([db_qk, db_v])


# ---- attention by a softmax, refined --------------------------------------------------------------------------------


class RefinedSoftmaxCache(NamedTuple):
    P: Any  # (B, H, L, L) the softmax, or None: then `softmax_of` makes it again
    refinement: Any  # RefinementCache; None where nothing is refined
    prior: Any = None  # cuda.Prior, where a GPU refines it in one go


def refined_softmax(scores, lam, variant, valid=None, causal=False):
    """Attention, refined, from scores (B, H, L, L), which may be written to; arguments as of `attention`."""
    xp = array_namespace(scores)
    refined = variant in REFINED
    if xp is not np and variant in ("high", "low"):
        B, prior = cuda.refined_softmax(scores, valid, -lam if variant == "low" else lam, causal)
        refinement = RefinementCache(variant, lam, causal, False, prior.P, B, None, None, None)
        return B, RefinedSoftmaxCache(prior.P, refinement, prior)
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


def softmax_of(cache):
    """P (B, H, L, L) of a RefinedSoftmaxCache."""
    if cache.P is not None:
        return cache.P
    return cuda.softmax_rows(cache.prior.scores, cache.prior.mask, cache.refinement.causal, True)


def refined_softmax_backward(dA, cache):
    """dA (B, H, L, L) -> dscores, and dlam in the shape of lam; None where nothing is refined, or by a fixed number."""
    refinement, dlam, gpu = cache.refinement, None, array_namespace(dA) is not np
    if refinement is not None and gpu and refinement.variant != "elemmul":
        sign = -1 if refinement.variant == "low" else 1
        ds, dlam = cuda.refined_softmax_backward(
            dA, refinement.B, cache.prior, sign * refinement.lam, refinement.causal
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


# ---- attention without a softmax ------------------------------------------------------------------------------------


class LinearWeightsCache(NamedTuple):
    phi_q: Any  # (B, H, L, E)
    phi_k: Any  # (B, H, L, E)
    A: Any  # (B, H, L, L)
    Z: Any  # (B, H, L, 1) the row sums
    visible: Any  # (.., L, L) booleans or None


def linear_weights(q, k, valid=None, causal=False):
    """A_jk = phi(q_j) phi(k_k) / sum over the k that j may see; q and k (B, H, L, E) -> A (B, H, L, L), cache.

    The rows of padded queries are zero.
    """
    phi_q, phi_k = elu_features(q), elu_features(k)
    A = product(phi_q, phi_k, transpose_b=True)
    visible = visible_entries(A, causal, None if valid is None else valid[:, None])
    if visible is not None:
        A *= visible
    Z = row_sum(A)
    Z = array_namespace(A).where(Z > 0, Z, 1)
    A /= Z
    return A, LinearWeightsCache(phi_q, phi_k, A, Z, visible)


def linear_weights_backward(dA, cache):
    """dA (B, H, L, L) -> dq, dk (B, H, L, E)."""
    phi_q, phi_k, A, Z, visible = cache
    xp = array_namespace(dA)
    # A = N / Z with N = phi_q phi_k^T and Z its row sums
    dN = (dA - row_dot(dA, A)) / Z
    if visible is not None:
        dN *= visible
    # phi(x) = x + 1 where x > 0, else e^x: its slope is 1 or phi itself
    dq = product(dN, phi_k) * xp.minimum(phi_q, 1)
    return dq, product(dN, phi_q, transpose_a=True) * xp.minimum(phi_k, 1)


def elu_features(x):
    """phi(x) = ELU(x) + 1, positive; any shape."""
    xp = array_namespace(x)
    return xp.where(x > 0, x + 1, xp.exp(xp.minimum(x, 0)))


def identity_weights(v, valid=None):
    """A_jj = 1, and a zero row for padding; v (B, H, L, E) -> A (B, H, L, L)."""
    B, H, L, _ = v.shape
    A = array_namespace(v).zeros((B, H, L, L), v.dtype)
    A.reshape(B, H, L * L)[..., :: L + 1] = 1 if valid is None else valid[:, None]
    return A


# ---- the whole ------------------------------------------------------------------------------------------------------


class AttentionCache(NamedTuple):
    q: Any  # (B, H, L, E), scaled by 1/sqrt(E) but for "linear"; None where there are no queries
    k: Any  # (B, H, L, E) or None
    v: Any  # (B, H, L, E)
    A: Any  # (B, H, L, L) attention after refinement and dropout
    weights: Any  # of refined_softmax or linear_weights
    dropout: Any
    variant: str
    own: Any


def attention(qkv, own, variant, valid=None, causal=False, rate=0.0, rng=None):
    """Mixed values and the attention that mixed them: qkv (B, L, 3, H, E) -> (B, L, H, E), A (B, H, L, L), cache.

    variant: of VARIANTS or MIXINGS; "none", "uniform" and "fixed" have neither queries nor keys: (B, L, 1, H, E). own:
    lambda of a refined variant, a number or (H, 1, 1), or the scores (H, P, P) of "fixed". valid: (B, L) booleans,
    False for padding, or None if there is none. Padding is never attended to. Refined attention is zero in the rows of
    padded queries too, for they must send no message, and so are "none" and "linear"; with the others these rows are
    a softmax like any other, as in other implementations. causal: no token attends to or hears a later one
    (Appendix C). rate: dropout of the refined attention, drawn from rng; A is that before dropout.
    """
    *qk, v = (qkv[:, :, n].transpose(0, 2, 1, 3) for n in range(qkv.shape[2]))  # views [B, H, L, E]
    q, k = qk or (None, None)
    L = v.shape[2]
    if variant == "none":
        A, weights_cache = identity_weights(v, valid), None
    elif variant == "linear":
        A, weights_cache = linear_weights(q, k, valid, causal)
    else:
        if variant == "uniform":
            scores = array_namespace(v).zeros((*v.shape[:2], L, L), v.dtype)
        elif variant == "fixed":
            scores = array_namespace(v).tile(own[:, :L, :L], (len(v), 1, 1, 1))
        else:
            q = q * q.dtype.type(1 / math.sqrt(q.shape[-1]))
            scores = product(q, k, transpose_b=True)  # [L, E] @ [E, L] -> [L, L]
        A, weights_cache = refined_softmax(scores, own, variant, valid, causal)
    used, dropout_cache = dropout(A, rate, rng)
    mixed = product(used, v).transpose(0, 2, 1, 3)  # [L, L] @ [L, E] -> [L, E]
    return mixed, A, AttentionCache(q, k, v, used, weights_cache, dropout_cache, variant, own)


def attention_backward(dmixed, cache, dA_itself=None):
    """dmixed (B, L, H, E) -> dqkv (B, L, 3, H, E), or (B, L, 1, H, E), and the gradient of `own` in its shape, None
    where the attention does not depend on it. dA_itself: (B, H, L, L) what A receives beside that, from a penalty."""
    q, k, v, A, variant = cache.q, cache.k, cache.v, cache.A, cache.variant
    xp = array_namespace(dmixed)
    dmixed = dmixed.transpose(0, 2, 1, 3)
    B, H, L, E = v.shape
    dqkv = xp.empty((B, L, 1 if q is None else 3, H, E), dmixed.dtype)
    *dqk, dv = (dqkv[:, :, n].transpose(0, 2, 1, 3) for n in range(dqkv.shape[2]))
    # mixed = A v
    dv[...] = product(A, dmixed, transpose_a=True)
    if variant in ("none", "uniform"):
        return dqkv, None
    dA = product(dmixed, v, transpose_b=True)
    dA = dropout_backward(dA, cache.dropout)
    if dA_itself is not None:
        dA += dA_itself
    if variant == "linear":
        dqk[0][...], dqk[1][...] = linear_weights_backward(dA, cache.weights)
        return dqkv, None
    ds, dlam = refined_softmax_backward(dA, cache.weights)
    if variant == "fixed":
        down = xp.zeros_like(cache.own)
        down[:, :L, :L] = ds.sum(axis=0)
        return dqkv, down
    # scores = (q / sqrt(E)) k^T; q is cached scaled
    dqk[0][...] = product(ds, k) * q.dtype.type(1 / math.sqrt(E))
    dqk[1][...] = product(ds, q, transpose_a=True)
    return dqkv, dlam
