"""Refined attention straight from queries, keys and values, in memory linear in the number of tokens.

Axis letters: L tokens (i and j rows, k label), E width of a query and a key, F width of a value; a stripe has R rows
and sees n labels: all L, or if causal those up to its last row.

An (L, L) array never exists. Every pass walks over the rows in stripes (R, n) and computes what it needs of s, P, t
and B (as in refinement.py) again from Q and K:

    s_jk = Q_j . K_k / sqrt(E)              scores
    P_j  = softmax_k(s_jk)                  priors                                             (Eqs. 1, 8)
    t_jk = 1 - c P_jk                       messages                                           (Eq. 9 / e^lam)
    B_j  = softmax_k(s_jk + C_jk)           beliefs; s is log P up to a number per row         (Eqs. 10, 11)
    O_j  = sum_k B_jk V_k                   output

What a row has to know of the others is one number per label, the evidence C. Without a causal mask C sums over all
rows: a first pass collects it, a second one uses it. With the mask it sums over the rows above, so one pass downwards
carries it along and never visits the future. Backwards, a message needs per label what the rows that heard it say
about it: without the mask a pass of its own, with it a sum carried upwards.

Nothing is approximated, and beliefs stay in logarithms: where everyone attends to one sink, the evidence moves a row
to keys whose P has underflowed to zero in a dense float32 matrix; here their scores are still there.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from ..backend import FLOATS, array_namespace, as_array, to_host, valid_array
from .refine import checked_lam, within_dtype
from .refinement import VARIANTS, potts_messages, sum_to_shape

ROWS = 64  # of a stripe: enough for a fast matrix product; (64, 16384) float32 is 4 MiB, a few of them stay in cache


# ---- one stripe of rows ---------------------------------------------------------------------------------------------


def _stripes(L):
    return [slice(a, min(a + ROWS, L)) for a in range(0, L, ROWS)]


def _scores(Q, K, rows, causal):
    """s of a stripe, (R, n), -inf where a row must not look. Q comes divided by sqrt(E)."""
    if not causal:
        return Q[rows] @ K.T
    xp = array_namespace(Q)
    s = Q[rows] @ K[: rows.stop].T
    s[:, rows] = xp.where(xp.tri(rows.stop - rows.start, dtype=bool), s[:, rows], -np.inf)
    return s


def _softmax(s, out=None):
    """exp(s) with its rows normalised."""
    xp = array_namespace(s)
    p = xp.subtract(s, xp.max(s, axis=-1, keepdims=True), out=out)
    xp.exp(p, out=p)
    p /= xp.sum(p, axis=-1, keepdims=True)
    return p


def _priors(Q, K, rows, causal):
    s = _scores(Q, K, rows, causal)
    return _softmax(s, out=s)


# ---- "original": softmax attention, no messages ---------------------------------------------------------------------
# Every variant is a pair of functions of one head without padding; lam and include_self are for the Potts factor only.


def _original(Q, K, V, lam, causal, include_self):
    O = array_namespace(Q).empty_like(V)
    for rows in _stripes(len(Q)):
        P = _priors(Q, K, rows, causal)
        O[rows] = P @ V[: P.shape[1]]
    return O, None


def _original_backward(dO, O, Q, K, V, lam, causal, include_self, state):
    xp = array_namespace(Q)
    dQ, dK, dV = xp.empty_like(Q), xp.zeros_like(K), xp.zeros_like(V)
    D = xp.sum(dO * O, axis=-1, keepdims=True)
    for rows in _stripes(len(Q)):
        P = _priors(Q, K, rows, causal)
        n = P.shape[1]
        # O_j = sum_k P_jk V_k
        dV[:n] += P.T @ dO[rows]
        ds = dO[rows] @ V[:n].T
        # P_j = softmax(s_j): ds = P (dP - sum_k P dP), and that sum is dO_j . O_j
        ds -= D[rows]
        ds *= P
        # s_jk = Q_j . K_k
        dQ[rows] = ds @ K[:n]
        dK[:n] += ds.T @ Q[rows]
    return dQ, dK, dV, 0.0


# ---- "high" and "low": the Potts factor, Eqs. 7 and 16 --------------------------------------------------------------


def _hear(s, log_t, C, causal, include_self):
    """l_jk = s_jk + C_jk of a stripe up to a number per row, written over s.

    C: (L,) float64, sum of log t_ik over all rows i, or if causal over those above the stripe.
    """
    xp = array_namespace(s)
    C = C[: s.shape[1]]
    s += (C - xp.max(C)).astype(s.dtype)  # less its maximum: the labels that keep weight keep their digits
    if causal:  # a cumulative sum down the rows is the product with a triangle of ones: one BLAS call
        s += xp.tri(len(s), k=0 if include_self else -1, dtype=s.dtype) @ log_t
    elif not include_self:
        s -= log_t
    return s


def _hear_backward(dl, g, causal, include_self):
    """dlog_t of a stripe. g: (L,) float64, sum of dl_jk over all rows j, or if causal over those below the stripe."""
    xp = array_namespace(dl)
    g = g[: dl.shape[1]].astype(dl.dtype)
    if causal:
        return xp.tri(len(dl), k=0 if include_self else -1, dtype=dl.dtype).T @ dl + g
    return g + xp.zeros_like(dl) if include_self else g - dl


def _potts(Q, K, V, lam, causal, include_self):
    xp = array_namespace(Q)
    L = len(Q)
    O, C = xp.empty_like(V), xp.zeros(L)  # C in float64: it sums up to L terms
    if not causal:
        for rows in _stripes(L):
            t = potts_messages(_priors(Q, K, rows, causal), lam)
            C += xp.sum(xp.log(t, out=t), axis=0)
    for rows in _stripes(L):
        s = _scores(Q, K, rows, causal)
        n = s.shape[1]
        t = potts_messages(_softmax(s), lam)
        log_t = xp.log(t, out=t)
        l = _hear(s, log_t, C, causal, include_self)
        O[rows] = _softmax(l, out=l) @ V[:n]
        if causal:
            C[:n] += xp.sum(log_t, axis=0)
    return O, C


def _potts_backward(dO, O, Q, K, V, lam, causal, include_self, C):
    xp = array_namespace(Q)
    L = len(Q)
    dQ, dK, dV, dlam = xp.empty_like(Q), xp.zeros_like(K), xp.zeros_like(V), 0.0
    # Rows of B sum to 1, so a vector taken off all values changes no gradient; where rows agree, it keeps digits.
    shared = xp.sum(O, axis=0) / max(L, 1)
    V, O = V - shared, O - shared
    D = xp.sum(dO * O, axis=-1, keepdims=True)
    C, g = C.copy(), xp.zeros(L)
    if not causal:
        # g_k = sum_j dl_jk = sum_j B_jk (dO_j . V_k - D_j) = V_k . dV_k - sum_j B_jk D_j
        dO_D = xp.concatenate([dO, D], axis=-1)
        sums = xp.zeros_like(dO_D)
        for rows in _stripes(L):
            s = _scores(Q, K, rows, causal)
            t = potts_messages(_softmax(s), lam)
            l = _hear(s, xp.log(t, out=t), C, causal, include_self)
            sums += _softmax(l, out=l).T @ dO_D[rows]
        dV = sums[:, :-1]
        g += xp.sum(V * dV, axis=-1) - sums[:, -1]
    for rows in reversed(_stripes(L)):  # upwards: if causal, the rows that heard this stripe have had their turn
        s = _scores(Q, K, rows, causal)
        n = s.shape[1]
        P = _softmax(s)
        t = potts_messages(P, lam)
        log_t = xp.log(t)
        if causal:
            C[:n] -= xp.sum(log_t, axis=0)  # what the stripe found on the way down
        l = _hear(s, log_t, C, causal, include_self)
        B = _softmax(l, out=l)
        # O_j = sum_k B_jk V_k
        dl = dO[rows] @ V[:n].T
        if causal:
            dV[:n] += B.T @ dO[rows]
        # B_j = softmax(l_j): dl = B (dB - sum_k B dB), and that sum is dO_j . O_j
        dl -= D[rows]
        dl *= B
        # l_jk = s_jk + C_jk: dlog_t_ik = sum of dl_jk over the j that hear i
        dt = _hear_backward(dl, g, causal, include_self)
        if causal:
            g[:n] += xp.sum(dl, axis=0)
        # log t
        dt /= t
        # t_ik = 1 - (1 - e^-lam) P_ik and P_i = softmax(s_i): ds = dl - c P (dt - sum_k P dt). A number per row, taken
        # off dt, cancels; the value at the largest P keeps digits where dt is as large as e^lam.
        top = xp.take_along_axis(dt, xp.argmax(P, axis=-1)[:, None], axis=-1)
        dt -= top
        dt *= P
        mean = xp.sum(dt, axis=-1, keepdims=True)
        dlam = dlam - math.exp(-lam) * xp.sum(top + mean, dtype=np.float64)
        P *= mean
        dt -= P
        dt *= math.expm1(-lam)
        ds = dl
        ds += dt
        # s_jk = Q_j . K_k
        dQ[rows] = ds @ K[:n]
        dK[:n] += ds.T @ Q[rows]
    return dQ, dK, dV, dlam


# ---- "elemmul": no Potts factor, Eq. 15 -----------------------------------------------------------------------------
#
# B_ij = M_ij / Z_i with M = P P^T, so O_i = sum_k P_ik W_k / Z_i with W_k = sum_j P_jk V_j. Z is the same sum for a
# value of 1: V gets a column of ones. If causal, W is carried down the rows and M is formed inside a stripe only.


def _with_ones(V):
    xp = array_namespace(V)
    return xp.concatenate([V, xp.ones_like(V[:, :1])], axis=-1)


def _elemmul(Q, K, V, lam, causal, include_self):
    xp = array_namespace(Q)
    L, V1 = len(Q), _with_ones(V)
    N = xp.empty_like(V1)
    W = xp.zeros(V1.shape, np.float64 if causal else V.dtype)  # the causal backward pass takes it apart again
    if not causal:
        for rows in _stripes(L):
            W += _priors(Q, K, rows, causal).T @ V1[rows]
    for rows in _stripes(L):
        P = _priors(Q, K, rows, causal)
        n = P.shape[1]
        N[rows] = P @ W[:n].astype(P.dtype, copy=False)
        if causal:
            N[rows] += xp.tril(P @ P.T) @ V1[rows]
            W[:n] += P.T @ V1[rows]
    return N[:, :-1] / N[:, -1:], (W, N[:, -1:])


def _elemmul_backward(dO, O, Q, K, V, lam, causal, include_self, state):
    xp = array_namespace(Q)
    L, V1 = len(Q), _with_ones(V)
    W, Z = state[0].copy(), state[1]
    dQ, dK, dV1, dW = xp.empty_like(Q), xp.zeros_like(K), xp.empty_like(V1), xp.zeros_like(V1)
    # O = N / Z: numerator and normaliser side by side, as V and 1 are
    dN = xp.concatenate([dO, -xp.sum(dO * O, axis=-1, keepdims=True)], axis=-1) / Z
    if not causal:
        for rows in _stripes(L):
            dW += _priors(Q, K, rows, causal).T @ dN[rows]
    for rows in reversed(_stripes(L)):
        P = _priors(Q, K, rows, causal)
        n = P.shape[1]
        if causal:
            W[:n] -= P.T @ V1[rows]
        # N_i = sum_k P_ik W_k and W_k = sum_j P_jk V1_j
        dP = dN[rows] @ W[:n].astype(P.dtype, copy=False).T
        dP += V1[rows] @ dW[:n].T
        dV1[rows] = P @ dW[:n]
        if causal:
            # inside the stripe N = M V1, M = P P^T on and below the diagonal
            dM = xp.tril(dN[rows] @ V1[rows].T)
            dP += (dM + dM.T) @ P
            dV1[rows] += xp.tril(P @ P.T).T @ dN[rows]
            dW[:n] += P.T @ dN[rows]
        # P_i = softmax(s_i)
        ds = dP
        ds -= xp.sum(dP * P, axis=-1, keepdims=True)
        ds *= P
        # s_jk = Q_j . K_k
        dQ[rows] = ds @ K[:n]
        dK[:n] += ds.T @ Q[rows]
    return dQ, dK, dV1[:, :-1], 0.0


# ---- the public names -----------------------------------------------------------------------------------------------

PAIRS = {
    "original": (_original, _original_backward),
    "high": (_potts, _potts_backward),
    "low": (_potts, _potts_backward),
    "elemmul": (_elemmul, _elemmul_backward),
}


class StreamingCache(NamedTuple):
    Q: Any  # (..., L, E)
    K: Any  # (..., L, E)
    V: Any  # (..., L, F)
    lam: Any  # a number or (..., 1, 1)
    variant: str
    causal: bool
    valid: Any  # (..., L) booleans or None
    include_self: bool
    output: Any  # (..., L, F)
    states: list  # per head, of its valid tokens: C (L,); for elemmul W (L, F + 1) and Z (L, 1); None for original


def streaming_attention(Q, K, V, lam, *, variant="high", causal=False, valid=None, include_self=False):
    """softmax(Q K^T / sqrt(E)), refined as by `minisaobp.refine`, times V (Eqs. 1, 8-11, 15, 16), in linear memory.

    Q, K: (..., L, E); V: (..., L, F); float16, float32 or float64, all the same; finite, as the scores must be.
    lam, variant, causal, valid, include_self: as in `minisaobp.refine`, where A has the shape (..., L, L).
    Padded tokens take no part, and their output rows are zero under every variant, "original" included.

    Returns the output, (..., L, F) in V's dtype (float16 is computed in float32), and the cache for
    `streaming_attention_backward`, which refers to Q, K and V. Inputs are never written to. Heads are computed one
    after the other; extra memory is a few arrays of 64 rows by L, and of L by E or F.
    NumPy gives NumPy, CuPy gives CuPy, other DLPack arrays give NumPy. Raises ValueError or TypeError that names the
    argument, its shape and what was expected.

    >>> from minisaobp import refine
    >>> Q = K = V = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> output, cache = streaming_attention(Q, K, V, 0.2)
    >>> np.allclose(output, refine(np.exp(Q @ K.T / np.sqrt(2)), 0.2) @ V)
    True
    """
    Q, K, V, lam, valid = _checked(Q, K, V, lam, variant, valid)
    output = array_namespace(V).zeros(V.shape, V.dtype)
    cache = StreamingCache(Q, K, V, lam, variant, causal, valid, include_self, output, [])
    forward, _ = PAIRS[variant]
    for tokens, signed, *QKV in _heads(cache, Q, K, V):
        output[tokens], state = forward(*QKV, signed, causal, include_self)
        cache.states.append(state)
    return output, cache


def streaming_attention_backward(dO, cache):
    """Gradient of sum(dO * output) of `streaming_attention`: dQ, dK, dV, dlam, in memory linear in L too.

    dO: (..., L, F), the upstream gradient, floating point, of the output's shape. The cache is left as it is.

    Returns dQ, dK, dV in the shape and dtype of Q, K, V, zero for padded tokens (what float16 cannot hold becomes its
    largest number), and dlam in lam's shape, float64, zero for "original" and "elemmul".
    Raises ValueError or TypeError that names dO, its shape and what was expected.

    >>> Q = K = V = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> output, cache = streaming_attention(Q, K, V, 0.2)
    >>> dQ, dK, dV, dlam = streaming_attention_backward(np.ones((3, 2)), cache)
    >>> round(float(dV.sum()), 12)                          # each of 3 rows of B sums to 1, for each of 2 columns
    6.0
    """
    dO = as_array(dO, "dO")
    xp = array_namespace(dO)
    if dO.dtype.name not in FLOATS:
        raise TypeError(f"dO: expected float16, float32 or float64, got {dO.dtype} of shape {dO.shape}")
    if dO.shape != cache.output.shape:
        raise ValueError(f"dO: expected the shape of the output, {cache.output.shape}, got {dO.shape}")
    if not xp.isfinite(dO).all():
        raise ValueError(f"dO: expected finite values, shape {dO.shape}")
    dQ, dK, dV = (xp.zeros(x.shape, _working(x.dtype)) for x in (cache.Q, cache.K, cache.V))
    dlam = xp.zeros((*dQ.shape[:-2], 1, 1))
    _, backward = PAIRS[cache.variant]
    heads = _heads(cache, cache.Q, cache.K, cache.V, dO, cache.output)
    for state, (tokens, signed, q, k, v, do, o) in zip(cache.states, heads, strict=True):
        # Q / sqrt(E) went into the head
        dq, dK[tokens], dV[tokens], dsigned = backward(do, o, q, k, v, signed, cache.causal, cache.include_self, state)
        dQ[tokens] = dq / math.sqrt(dQ.shape[-1])
        dlam[tokens[:-1]] = -dsigned if cache.variant == "low" else dsigned
    return *(within_dtype(x, cache.Q.dtype) for x in (dQ, dK, dV)), sum_to_shape(dlam, np.shape(cache.lam))


def _heads(cache, Q, *others):
    """Head by head: the index of its valid tokens, signed lam, and there Q / sqrt(E) and the others.

    Leaving padding out is all a mask has to do: no message, no weight, and a row of zeros where nothing is written.
    """
    xp = array_namespace(Q)
    *shape, L, E = Q.shape
    lams = np.broadcast_to(to_host(cache.lam), (*shape, 1, 1))
    valid = None if cache.valid is None else xp.broadcast_to(cache.valid, (*shape, L))
    for head in np.ndindex(*shape):
        tokens = (*head, slice(None) if valid is None else xp.flatnonzero(valid[head]))
        signed = float(lams[head].item() * (-1 if cache.variant == "low" else 1))
        q, *rest = (x[tokens].astype(_working(Q.dtype), copy=False) for x in (Q, *others))
        yield tokens, signed, q / math.sqrt(E), *rest


def _working(dtype):
    return np.promote_types(dtype, np.float32)


def _checked(Q, K, V, lam, variant, valid):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    Q, K, V = as_array(Q, "Q"), as_array(K, "K"), as_array(V, "V")
    xp = array_namespace(Q, K, V)
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        if x.dtype.name not in FLOATS or x.dtype != Q.dtype:
            raise TypeError(f"{name}: expected float16, float32 or float64 as Q, got {x.dtype} of shape {x.shape}")
        if x.ndim < 2 or 0 in x.shape[-2:]:
            raise ValueError(f"{name}: expected shape (..., L, width), L and width at least 1, got {x.shape}")
        if not xp.isfinite(x).all():
            raise ValueError(f"{name}: expected finite values, shape {x.shape}")
    if K.shape != Q.shape:
        raise ValueError(f"K: expected the shape of Q, {Q.shape}, got {K.shape}")
    if V.shape[:-1] != Q.shape[:-1]:
        raise ValueError(f"V: expected shape (..., L, width) with (..., L) as in Q of shape {Q.shape}, got {V.shape}")
    # what lam and valid have to fit is the attention matrix; a view without memory stands in for it
    A = xp.broadcast_to(Q[..., :1], (*Q.shape[:-1], Q.shape[-2]))
    lam, valid = checked_lam(lam, A), valid_array(valid, A)
    if Q.size:
        largest = math.sqrt(Q.shape[-1]) * float(abs(Q).max()) * float(abs(K).max())
        if not largest < np.finfo(_working(Q.dtype)).max:
            raise ValueError(f"Q, K: expected scores within {_working(Q.dtype)}, got up to {largest:.0e}")
    return Q, K, V, lam, valid
