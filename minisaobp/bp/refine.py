"""The public names of the refinement: arguments checked, stacks of matrices shared between cores.

The mathematics is in `refinement.py` (one step) and `multistep.py` (several).
"""

import numbers

import numpy as np

from ..backend import array_namespace, as_array, attention_array, in_pieces, valid_array
from .multistep import Factor, check_steps, refine_steps, refine_steps_backward
from .refinement import (
    MAX_LAM,
    VARIANTS,
    normalise_rows,
    normalise_rows_backward,
    potts_messages,
    potts_messages_backward,
    refine_rows,
    refine_rows_backward,
    sum_to_shape,
    visible_entries,
)


def refine(A, lam, *, variant="high", causal=False, valid=None, include_self=False, steps=1, damping=0.0):
    """Attention refined by one step of belief propagation: Algorithm 1 (Eqs. 8-11), Eq. 16 or Eq. 15; or by several.

    A: (..., L, L), floating point, >= 0; rows are read as distributions over tokens, so only their proportions
        matter. A row of zeros sends no message and stays zero.
    lam: a finite number, or an array of shape (..., 1, 1) that broadcasts against A, such as (H, 1, 1) for one value
        per head; |lam| <= 80. Not used by "original" and "elemmul".
    variant: "high" (Eq. 7, repulsive), "low" (Eq. 16, attractive), "elemmul" (Eq. 15, no Potts term), or "original",
        which only normalises the rows.
    causal: token j attends to and hears only tokens i < j and itself; entries of A above the diagonal count as 0.
    valid: (..., L) booleans, False for padding; padded tokens neither send nor receive nor are attended to.
    include_self: multiply by the message of j to itself as well, which is Eq. 11 as printed; in later steps every
        token then counts itself among its neighbours.
    steps, damping: that many steps of flooding with the messages of Eq. 3, which leave out their receiver, and the
        share in [0, 1) of the old log-message kept in each, the uniform one in the first; only "high" and "low".
        Anything but one step without damping holds arrays of A.size * L float64 numbers, and refuses with ValueError
        if that is more than 2**24 (one matrix of L = 256).

    Returns B of A's shape and dtype (float16 is computed in float32): every row sums to 1 or is empty, and a zero of
    A stays exactly zero, except under "elemmul". In float32 the evidence C_jk carries a rounding error of about
    L * 6e-8. A is never written to. NumPy gives NumPy, CuPy gives CuPy, other DLPack arrays give NumPy.
    Raises ValueError or TypeError that names the argument, its shape and what was expected.

    >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
    >>> refine(A, 0.2).round(4)
    array([[0.7935, 0.2065],
           [0.5709, 0.4291]])
    """
    A, lam, valid = _checked(A, lam, variant, valid, steps, damping)
    stack, lams, valids = _stacked(A, lam, valid)
    B = array_namespace(A).empty_like(stack)

    def work(part):
        P, _, visible = _rows(stack[part], causal, None if valids is None else valids[part])
        if variant == "original":
            B[part] = P
        elif steps == 1 and not damping:
            options = {"causal": causal, "include_self": include_self, "visible": visible}
            if B.dtype == P.dtype:
                refine_rows(P, lams[part], variant, **options, out=B[part])
            else:  # float16 is computed in float32
                B[part], _ = refine_rows(P, lams[part], variant, **options)
        else:
            B[part], _ = refine_steps(P, _potts_factor(lams, variant), steps, damping, causal, include_self)

    in_pieces(work, stack, whole=steps > 1 or damping > 0)
    return B.reshape(A.shape)


def refine_vjp(A, lam, dB, *, variant="high", causal=False, valid=None, include_self=False, steps=1, damping=0.0):
    """Gradient of sum(dB * refine(A, lam, ...)): dA in A's shape and dtype, dlam in lam's shape.

    dB: (..., L, L), the upstream gradient, of A's shape. Other arguments, dtype rules and errors as `refine`.
    The gradient is that of the row-normalised A, so each row of A * dA sums to zero. At an exact zero of A it can be
    beyond any bound: B/A is capped at e^80 there, and what A's dtype cannot hold at its largest number.

    >>> dA, dlam = refine_vjp(np.array([[0.8, 0.2], [0.6, 0.4]]), 0.2, np.array([[1.0, 0.0], [0.0, 0.0]]))
    >>> bool(dlam < 0)                    # a larger lam takes weight from the key that both rows attend to
    True
    """
    A, lam, valid = _checked(A, lam, variant, valid, steps, damping)
    dB = upstream_gradient(dB, A)
    stack, lams, valids = _stacked(A, lam, valid)
    dB = dB.reshape(stack.shape)
    dA, dlams = array_namespace(A).empty_like(stack), array_namespace(A).zeros((len(stack), 1, 1))

    def work(part):
        P, S, visible = _rows(stack[part], causal, None if valids is None else valids[part])
        dP = dB[part]
        if variant == "original":
            pass
        elif steps == 1 and not damping:
            _, cache = refine_rows(P, lams[part], variant, causal=causal, include_self=include_self, visible=visible)
            dP, dlams[part] = refine_rows_backward(dP, cache)
        else:
            _, cache = refine_steps(P, _potts_factor(lams, variant), steps, damping, causal, include_self)
            dP, dlams[part] = refine_steps_backward(dP, cache)
        if A.dtype == dP.dtype:
            normalise_rows_backward(dP, P, S, visible, out=dA[part])
        else:  # float16 is computed in float32
            dA[part] = within_dtype(normalise_rows_backward(dP, P, S, visible), A.dtype)

    in_pieces(work, stack, whole=steps > 1 or damping > 0)
    return dA.reshape(A.shape), sum_to_shape(dlams.reshape(*A.shape[:-2], 1, 1), np.shape(lam))


def _stacked(A, lam, valid):
    """A as (N, L, L), lam as (N, 1, 1), valid as (N, L) or None: one leading axis that can be cut into pieces."""
    xp, L = array_namespace(A), A.shape[-1]
    lams = xp.broadcast_to(xp.asarray(lam), (*A.shape[:-2], 1, 1)).reshape(-1, 1, 1)
    valids = None if valid is None else xp.broadcast_to(valid, A.shape[:-1]).reshape(-1, L)
    return A.reshape(-1, L, L), lams, valids


def _rows(A, causal, valid):
    """P and S as of `normalise_rows`, in float32 or float64, and what is visible."""
    visible = visible_entries(A, causal, valid)
    P, S = normalise_rows(A.astype(np.float32) if A.dtype == np.float16 else A, visible)
    return P, S, visible


def checked_rows(A, causal, valid):
    """A, checked: P and S as of `normalise_rows`, in float32 or float64; what is visible; and the dtype A had."""
    A = attention_array(A)
    return *_rows(A, causal, valid_array(valid, A)), A.dtype


def upstream_gradient(dB, P):
    """dB checked, in the dtype of P, or float32 if that is float16, which could not hold what dB may."""
    dB = as_array(dB, "dB")
    if dB.dtype.kind != "f":
        raise TypeError(f"dB: expected a floating-point array, got {dB.dtype} of shape {dB.shape}")
    if dB.shape != P.shape:
        raise ValueError(f"dB: expected the shape of A, {P.shape}, got {dB.shape}")
    if dB.size and not (dB.max() < np.inf and dB.min() > -np.inf):  # a NaN fails both
        raise ValueError(f"dB: expected finite values, shape {dB.shape}")
    return dB.astype(np.promote_types(P.dtype, np.float32), copy=False)


def within_dtype(x, dtype):
    """x in that dtype; what it cannot hold becomes its largest number."""
    largest = np.finfo(dtype).max
    return x if x.dtype == dtype else array_namespace(x).clip(x, -largest, largest).astype(dtype)


def _checked(A, lam, variant, valid, steps, damping):
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    check_steps(steps, damping)
    if variant in ("original", "elemmul") and (steps > 1 or damping):
        raise ValueError(
            f"steps: variant {variant!r} passes no messages, so it has no second step and nothing to damp; expected "
            f"steps=1 and damping=0, got steps={steps}, damping={damping}"
        )
    A = attention_array(A)
    return A, checked_lam(lam, A), valid_array(valid, A)


def _potts_factor(lam, variant):
    """Eq. 7 or Eq. 16 for `refine_steps`."""
    sign = -1 if variant == "low" else 1

    def messages_backward(dt, q):
        dq, dlam = potts_messages_backward(dt, q, sign * lam)
        return dq, sign * dlam

    return Factor(lambda q: potts_messages(q, sign * lam), messages_backward)


def checked_lam(lam, A):
    """lam as a float or a float64 array (..., 1, 1) in A's library."""
    xp = array_namespace(A)
    try:
        array = np.asarray(lam) if isinstance(lam, numbers.Real) else as_array(lam, "lam")
        if isinstance(lam, bool) or array.dtype.kind not in "iuf":
            raise TypeError
        array = array.astype(np.float64)
    except (TypeError, OverflowError):
        raise TypeError(f"lam: expected a number or an array of shape (..., 1, 1), got {type(lam).__name__}") from None
    if array.ndim:
        try:
            fits = array.shape[-2:] == (1, 1) and np.broadcast_shapes(array.shape, A.shape) == A.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"lam: expected a number or shape (..., 1, 1) that fits A of shape {A.shape}, got {array.shape}"
            )
    if not (abs(array) <= MAX_LAM).all():
        raise ValueError(f"lam: expected finite values with |lam| <= {MAX_LAM:g}, got {lam!r}")
    return xp.asarray(array) if array.ndim else float(array)
