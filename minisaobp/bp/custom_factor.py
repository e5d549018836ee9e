"""Eqs. 8-11 with any pairwise factor psi in the place of Potts, which the paper leaves open; gradients by hand.

Axis letters: L tokens; i sends, j receives; r is the sender's label, k the receiver's.

    t_ik = sum_r P_ir psi_rk                      the message of i about label k    (Eq. 9)

and from there as in `refinement.py`: a factor changes the messages, not what is made of them. A constant in psi
cancels, so psi is divided by the geometric middle of its entries, which keeps every message near 1.

psi may be asymmetric: then every token sends its row @ psi all the same, whoever receives. In a factor graph the two
ends of a factor read it from two sides (one of them sends through psi transposed), so only a symmetric psi makes the
result belief propagation on one graph of all tokens, unless `causal` lets each pair speak in one direction only.
"""

import numpy as np

from ..backend import array_namespace, attention_array
from .multistep import Factor, check_steps, refine_steps, refine_steps_backward
from .refine import checked_rows, upstream_gradient, within_dtype
from .refinement import MAX_LAM, beliefs, beliefs_backward, normalise_rows_backward, sum_to_shape


def factor_messages(P, psi):
    """t = P psi, (..., n, L) from P (..., n, L) and psi (..., L, L); an empty row has t = 1, it says nothing."""
    t = P @ psi
    return array_namespace(P).where(P.any(axis=-1, keepdims=True), t, t.dtype.type(1))


def factor_messages_backward(dt, P, psi):
    """Gradient of `factor_messages`: dP (..., n, L), and dpsi in the shape of psi, in float64."""
    xp = array_namespace(dt)
    # t = P psi
    return dt @ xp.swapaxes(psi, -1, -2), sum_to_shape(xp.swapaxes(P, -1, -2) @ dt, psi.shape)


def refine_with_factor(A, psi, *, causal=False, valid=None, include_self=False, steps=1, damping=0.0):
    """Attention refined by belief propagation with the pairwise factor psi: Eqs. 8-11 with psi in the place of Eq. 7.

    A: (..., L, L), as for `refine`.
    psi: (L, L) or (..., L, L) that broadcasts against A, floating point; psi[r, k] > 0 says how well label r at the
        sender goes with label k at the receiver. Only proportions matter; they may be up to e^80.
    causal, valid, include_self, steps, damping: as for `refine`. Labels of padded tokens need no meaningful psi, but
        positive numbers.

    Returns B of A's shape and dtype (float16 is computed in float32), rows and zeros as from `refine`. Neither input
    is written to. Raises ValueError or TypeError that names the argument, its shape and what was expected.

    >>> from minisaobp import refine
    >>> from minisaobp.bp import bp_high
    >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
    >>> np.allclose(refine_with_factor(A, bp_high(0.2, 2)), refine(A, 0.2), rtol=0, atol=1e-15)
    True
    >>> near = np.exp(-abs(np.subtract.outer(np.arange(3.0), np.arange(3.0))))       # favours keys close to each other
    >>> A = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    >>> refine_with_factor(A, near)[0].round(3)                 # told twice of key 2: e^-4, e^-2 and 1, normalised
    array([0.016, 0.117, 0.867])
    """
    check_steps(steps, damping)
    P, _, _, dtype = checked_rows(A, causal, valid)
    psi, _, _ = _checked_factor(psi, P)
    if steps == 1 and not damping:
        psi = psi.astype(P.dtype)
        B, _ = beliefs(P, factor_messages(P, psi), _reach(psi), causal, include_self)
    else:
        B, _ = refine_steps(P, _as_factor(psi), steps, damping, causal, include_self)
    return B.astype(dtype, copy=False)


def refine_with_factor_vjp(A, psi, dB, *, causal=False, valid=None, include_self=False, steps=1, damping=0.0):
    """Gradient of sum(dB * refine_with_factor(A, psi, ...)): dA and dpsi, each in its argument's shape and dtype.

    dB: (..., L, L), the upstream gradient, of A's shape. Other arguments, dtype rules and errors as
    `refine_with_factor`, limits on dA as for `refine_vjp`. The sum of psi * dpsi is zero: a constant in psi cancels.

    >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
    >>> dA, dpsi = refine_with_factor_vjp(A, np.ones((2, 2)), np.array([[1.0, 0.0], [0.0, 0.0]]))
    >>> dpsi.round(3)                       # row 0 hears row 1, (0.6, 0.4); label 0 gains where psi points at it
    array([[ 0.096, -0.096],
           [ 0.064, -0.064]])
    """
    check_steps(steps, damping)
    P, S, visible, dtype = checked_rows(A, causal, valid)
    psi, middle, dtype_of_psi = _checked_factor(psi, P)
    dB = upstream_gradient(dB, P)
    if steps == 1 and not damping:
        psi = psi.astype(P.dtype)
        t = factor_messages(P, psi)
        B, ratio = beliefs(P, t, _reach(psi), causal, include_self)
        centred, dlog_t = beliefs_backward(dB, B, causal, include_self)
        dP, dpsi = factor_messages_backward(dlog_t / t, P, psi)
        dP += ratio * centred
    else:
        _, cache = refine_steps(P, _as_factor(psi), steps, damping, causal, include_self)
        dP, dpsi = refine_steps_backward(dB, cache)
    dA = normalise_rows_backward(dP, P, S, visible)
    return within_dtype(dA, dtype), within_dtype(dpsi / middle, dtype_of_psi)


def _checked_factor(psi, P):
    """psi / middle in float64, entries within e^-40 .. e^40; psi's middle (..., 1, 1); and the dtype it had."""
    psi = attention_array(psi, "psi")
    try:
        fits = np.broadcast_shapes(psi.shape, P.shape) == P.shape and psi.shape[-1] == P.shape[-1]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"psi: expected shape (..., L, L) that fits A of shape {P.shape}, got {psi.shape}")
    xp = array_namespace(psi)
    if not (psi > 0).all():
        raise ValueError(f"psi: expected values > 0, got a zero in shape {psi.shape}")
    double = psi.astype(np.float64)
    highest, lowest = (xp.log(bound(double, axis=(-2, -1), keepdims=True)) for bound in (xp.max, xp.min))
    if (highest - lowest > MAX_LAM).any():
        raise ValueError(
            f"psi: expected entries within a factor of e^{MAX_LAM:g} of each other, got e^{(highest - lowest).max():g}"
        )
    middle = xp.exp((highest + lowest) / 2)
    return double / middle, middle, psi.dtype


def _reach(psi):
    """A bound on |log t|: a message is a mean of psi's entries."""
    return float(abs(array_namespace(psi).log(psi)).max())


def _as_factor(psi):
    return Factor(lambda q: factor_messages(q, psi), lambda dt, q: factor_messages_backward(dt, q, psi))
