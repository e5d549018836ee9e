"""Eqs. 8-11, 15 and 16 vectorised over (..., L, L), with gradients derived by hand.

Axis letters: L tokens; i sends, j receives, k is the label (the token attended to).

Write P for A with its rows normalised (an empty row stays zero) and c = 1 - e^(-lam). Every message carries the same
factor e^lam, which the normalisation of the beliefs cancels; what is left of Eqs. 9 to 11 is

    t_ik = 1 - c P_ik                             the message of i about label k          (Eq. 9 / e^lam)
    C_jk = sum of log t_ik over the i j hears     the evidence about label k that reaches j
    B_jk = P_jk exp(C_jk) / Z_j                   the belief                              (Eqs. 10, 11)

j hears every i != j (Algorithm 1), with `include_self` itself too (Eq. 11 as printed), with `causal` only i < j.
BP-Low (Eq. 16) is lam < 0. An empty row has t = 1: it sends nothing, and its own belief stays zero.

exp(C) is a product of messages. A product over a block of rows costs one log per label, a sum of logs one per entry;
blocks are short enough not to underflow. A row that products cannot hold (all its mass on labels that everyone else
taxes) is computed again with logarithms.

More than one step is in `multistep.py`, a factor other than Potts in `custom_factor.py`; the public functions, which
check their arguments, are in `refine.py`.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import cuda
from ..backend import array_namespace, row_dot, row_sum
from .multistep import normalised_in_logs

VARIANTS = ("original", "high", "low", "elemmul")
MAX_LAM = 80.0  # one message, e^-lam, must be a normal float32 (they end at e^-87)
MAX_LOG_PRODUCT = 30.0  # a block's product is within e^-30 .. e^30: over the smallest Z, e^-55, still a float32


# ---- the pieces: priors (Eq. 8), messages (Eq. 9), beliefs (Eqs. 10, 11) --------------------------------------------


def normalise_rows(A, visible=None):
    """P_ik = A_ik / S_i over the visible entries; an empty row stays zero. Returns P and S of shape (..., L, 1).

    P is A itself where there is nothing to do: every row sums to 1 within 4 roundings, as a softmax leaves it. Those
    change a message by less than its own rounding does.
    """
    xp = array_namespace(A)
    if visible is not None:
        A = A * visible
    S = row_sum(A)
    if _sum_to_one(S):
        return A, S
    return A / xp.where(S > 0, S, 1), S


def normalise_rows_backward(dP, P, S, visible=None, out=None):
    """Gradient of `normalise_rows`: dA (..., L, L), written to `out` if given. A row without mass has none."""
    xp = array_namespace(dP)
    dA = xp.subtract(dP, row_dot(dP, P), out=out)
    if visible is not None:
        dA *= visible
    if _sum_to_one(S):  # P is A
        return dA
    # Beside a small S (of a row whose mass the causal mask hides) the quotient can pass the dtype's largest number.
    with np.errstate(over="ignore"):
        dA /= xp.where(S > 0, S, np.inf)
    largest = np.finfo(dA.dtype).max
    return xp.clip(dA, -largest, largest, out=dA)


def _sum_to_one(S):
    return not S.size or abs(S - 1).max() <= 4 * np.finfo(S.dtype).eps


def potts_messages(P, lam):
    """t = 1 - c P, shape of P, in [e^-lam, 1] for lam >= 0. lam: a number or (..., 1, 1). P: whole rows (..., n, L)."""
    xp = array_namespace(P)
    t = P * _like(np.expm1(-lam), P)
    t += 1
    if np.max(lam) > 2:  # t = (1 - P) + e^-lam P: a small e^-lam drowns beside the 1, and beside the rounding of a P
        large = P > 0.75  # near 1; there, at most once in a row (0.5 can be twice), 1 - P is the sum of the others
        others = xp.sum(xp.where(large, P.dtype.type(0), P), axis=-1, keepdims=True)
        t = xp.where(_like(lam, P) > 2, xp.where(large, others, 1 - P) + _like(np.exp(-lam), P) * P, t)
    return t


def potts_messages_backward(dt, P, lam):
    """Gradient of `potts_messages`: dP (..., L, L) and dlam in the shape of lam."""
    # t = 1 - (1 - e^-lam) P
    dtax = row_dot(dt, P).sum(axis=-2, keepdims=True, dtype=np.float64)
    return dt * _like(np.expm1(-lam), P), sum_to_shape(-np.exp(-lam) * dtax, np.shape(lam))


def beliefs(P, t, reach, causal=False, include_self=False, out=None):
    """Beliefs B from priors P and messages t, all (..., L, L), where |log t| <= reach.

    Returns B and the ratio B/P, which is finite also where P = 0 and is the gradient's factor there. With `out`, for
    which no gradient is wanted, B is written there and the ratio is None.
    """
    xp = array_namespace(P)
    weight = _product_of_messages(t, reach, causal)  # exp(C) up to a factor per row, j's own message included
    ratio = xp.empty_like(t) if out is None else out
    if include_self:
        ratio[...] = weight
    elif causal:
        xp.divide(weight, t, out=ratio)
    else:
        several = _rows_at_once(t)
        weight = xp.tile(weight, several.shape[-1] // t.shape[-1])
        xp.divide(weight, several, out=ratio.reshape(several.shape))
    Z = row_dot(P, ratio)
    # Terms below tiny * e^reach may have been lost (a weight below tiny, divided by a t as small as e^-reach).
    limits = np.finfo(P.dtype)
    faint = limits.tiny / limits.eps**2 * math.exp(reach) > Z
    ratio *= 1 / xp.where(faint, 1, Z)
    B = xp.multiply(P, ratio, out=out)
    if faint.any():
        B_in_logs, ratio_in_logs = _beliefs_in_logs(P, t, causal, include_self)
        xp.copyto(B, B_in_logs, where=faint)
        if out is None:
            xp.copyto(ratio, ratio_in_logs, where=faint)
    return B, (ratio if out is None else None)


def beliefs_backward(dB, B, causal=False, include_self=False):
    """Gradient through the normalisation and the product of messages, in logarithms.

    Returns dB centred row by row, so that dP = (B/P) * centred, and dlog_t, both (..., L, L).
    """
    xp = array_namespace(dB)
    # B_jk = exp(l_jk) / sum_k' exp(l_jk') with l = log P + C: a softmax
    centred = dB - row_dot(dB, B)
    dl = B * centred
    # l_jk = log P_jk + sum of log t_ik over the i that j hears: log t_ik collects from the j that hear i
    if causal:
        dlog_t = _down_the_rows(xp.add, dl[..., ::-1, :])[..., ::-1, :]  # j >= i
    else:  # every j
        several = _rows_at_once(dl)
        dlog_t = xp.sum(several, axis=-2).reshape(*dl.shape[:-2], -1, dl.shape[-1]).sum(axis=-2, keepdims=True)
        if not include_self:
            across = xp.tile(dlog_t, several.shape[-1] // dl.shape[-1])
            return centred, xp.subtract(across, several, out=several).reshape(dl.shape)
    return centred, (dlog_t + xp.zeros_like(dl) if include_self else dlog_t - dl)


def _product_of_messages(t, reach, causal):
    """prod_i t_ik up to a factor per row: over all i, shape (..., 1, L), or if causal over i <= j, (..., L, L)."""
    xp = array_namespace(t)
    L = t.shape[-1]
    block = max(1, int(MAX_LOG_PRODUCT / max(reach, MAX_LOG_PRODUCT / L)))
    C = xp.zeros((*t.shape[:-2], 1, L))  # float64: one number per label, and its exponential is what is kept
    if not causal:
        several = _rows_at_once(t)
        for a in range(0, several.shape[-2], block):
            product = xp.prod(several[..., a : a + block, :], axis=-2)
            product = product.reshape(*product.shape[:-1], -1, L)
            if reach <= MAX_LOG_PRODUCT:  # at most 16 products of e^-30 .. e^30 in one: within float64
                C += xp.log(xp.prod(product, axis=-2, keepdims=True, dtype=C.dtype))
            else:
                C += xp.sum(xp.log(product.astype(C.dtype)), axis=-2, keepdims=True)
        return xp.exp(C - xp.max(C, axis=-1, keepdims=True)).astype(t.dtype)
    product = xp.empty_like(t)
    for a in range(0, L, block):
        rows = _down_the_rows(xp.multiply, t[..., a : a + block, :])
        so_far = xp.exp(C - xp.max(C, axis=-1, keepdims=True)).astype(t.dtype)
        xp.multiply(rows, so_far, out=product[..., a : a + block, :])
        C += xp.log(rows[..., -1:, :].astype(C.dtype))
    return product


def _rows_at_once(t):
    """(..., L, L) seen as (..., L/n, n L), n rows side by side: NumPy's loops over short rows are mostly overhead."""
    L = t.shape[-1]
    n = max(n for n in (1, 2, 4, 8, 16) if L % n == 0 and (n == 1 or n * L <= 2048))
    return t.reshape(*t.shape[:-2], L // n, n * L)


def _down_the_rows(add_or_multiply, x):
    """Running sum or product of (..., n, L) over its rows: row by row, ten times as fast as cumsum over that axis."""
    total = array_namespace(x).empty_like(x)
    total[..., 0, :] = x[..., 0, :]
    for n in range(1, x.shape[-2]):
        add_or_multiply(total[..., n - 1, :], x[..., n, :], out=total[..., n, :])
    return total


def _beliefs_in_logs(P, t, causal, include_self):
    """What `beliefs` returns, by a sum of logarithms in float64: slower, and nothing can underflow unseen."""
    xp = array_namespace(P)
    log_t = xp.log(t.astype(np.float64))
    C = xp.cumsum(log_t, axis=-2) if causal else xp.sum(log_t, axis=-2, keepdims=True)
    C = C + xp.zeros_like(log_t) if include_self else C - log_t
    B, ratio = normalised_in_logs(P, C)
    return B.astype(P.dtype), ratio.astype(P.dtype)


# ---- one refinement of normalised rows, as a forward and backward pair ----------------------------------------------


class RefinementCache(NamedTuple):
    variant: str
    lam: Any  # a number or (..., 1, 1)
    causal: bool
    include_self: bool
    P: Any  # (..., L, L) priors
    B: Any  # (..., L, L) beliefs
    ratio: Any  # (..., L, L) B/P; for elemmul (..., L, 1), the row sums of P P^T
    t: Any  # (..., L, L) messages; None for elemmul
    visible: Any  # (..., L, L) booleans or None, used by elemmul only


def refine_rows(P, lam, variant="high", *, causal=False, include_self=False, visible=None, out=None):
    """Refined rows B of attention P, both (..., L, L); rows of P sum to 1 or 0 and are zero where not visible.

    Returns B and a cache for `refine_rows_backward`; with `out`, to which B is written, there is no cache: None.
    """
    if variant == "elemmul":
        # Eq. 15: B_ij ~ sum_k P_ik P_jk. P P^T is symmetric, so it gives weight back to what the mask forbade.
        xp = array_namespace(P)
        B = xp.matmul(P, xp.swapaxes(P, -1, -2), out=out)
        if visible is not None:
            B *= visible
        Z = row_sum(B)
        Z = xp.where(Z > 0, Z, 1)
        B /= Z
        cache = RefinementCache(variant, lam, causal, include_self, P, B, Z, None, visible)
        return B, cache if out is None else None
    signed = -lam if variant == "low" else lam
    if out is not None and array_namespace(P) is not np:
        return cuda.refine_rows(P, signed, causal, include_self, out), None
    t = potts_messages(P, signed)
    B, ratio = beliefs(P, t, float(np.max(np.abs(lam))), causal, include_self, out)
    return B, None if out is not None else RefinementCache(variant, lam, causal, include_self, P, B, ratio, t, None)


def refine_rows_backward(dB, cache):
    """Gradient of `refine_rows`: dP (..., L, L) and dlam in the shape of lam (0 for elemmul, which has none)."""
    xp = array_namespace(dB)
    P, B, t = cache.P, cache.B, cache.t
    if cache.variant == "elemmul":
        # B_ij = M_ij / Z_i with M = P P^T
        dM = (dB - row_dot(dB, B)) / cache.ratio
        if cache.visible is not None:
            dM *= cache.visible
        return (dM + xp.swapaxes(dM, -1, -2)) @ P, xp.zeros(np.shape(cache.lam)) if np.ndim(cache.lam) else 0.0
    sign = -1 if cache.variant == "low" else 1
    centred, dlog_t = beliefs_backward(dB, B, cache.causal, cache.include_self)
    dlog_t /= t
    dP, dlam = potts_messages_backward(dlog_t, P, sign * cache.lam)
    centred *= cache.ratio
    dP += centred
    return dP, sign * dlam


# ---- helpers ---------------------------------------------------------------------------------------------------------


def visible_entries(A, causal, valid):
    """Which entries (j, k) of A exist at all, (..., L, L) booleans: k <= j if causal, both valid. None means all."""
    xp = array_namespace(A)
    visible = None
    if causal:
        visible = xp.tri(A.shape[-1], dtype=bool)
    if valid is not None:
        both = valid[..., :, None] & valid[..., None, :]
        visible = both if visible is None else visible & both
    return visible


def _like(value, array):
    """A float64 number or array in the library and dtype of `array`, so that products keep that dtype."""
    return array_namespace(array).asarray(value, dtype=array.dtype)


def sum_to_shape(values, shape):
    """Sum (..., L, L) over every axis along which an array of that shape was broadcast, in float64; a float for ()."""
    if not shape:
        return float(values.sum(dtype=np.float64))
    added = values.ndim - len(shape)
    axes = tuple(range(added)) + tuple(added + a for a, n in enumerate(shape) if n == 1)
    return values.sum(axis=axes, dtype=np.float64).reshape(shape)
