"""Attention on a GPU: softmax, refinement and their gradients, and products of stacks of matrices. Each function stands
behind the function of array code that its docstring names, which is its reference and what runs on NumPy; `tests/gpu`
compares the two.

Axis letters: N matrices or rows, B batch, H heads, L tokens.
"""

import math

import numpy as np

from .launch import by_rows, constant, cupy_library, has_clusters, in_order, items_of, kernel

TEAM = 8  # warps of each of the blocks that share a matrix


def _blocks(L):
    """How many blocks hold a matrix in registers between them (attention.cu), or 0 if it cannot be held."""
    items = items_of(L)
    if items <= 4:
        return 1
    return (4 if items == 8 else 16) if items <= 16 and has_clusters(cupy_library().cuda.Device().id) else 0


def _decays(lam, stack):
    """e^-lambda and 1 - e^-lambda for every matrix of a stack (..., L, L), each (N,) in the stack's dtype."""
    cupy, shape = cupy_library(), stack.shape[:-2]
    if isinstance(lam, cupy.ndarray):
        lams = cupy.broadcast_to(lam.astype(np.float64), (*shape, 1, 1)).reshape(-1)
        return cupy.exp(-lams).astype(stack.dtype), (-cupy.expm1(-lams)).astype(stack.dtype)
    where = math.prod(shape), stack.dtype.char, cupy.cuda.Device().id
    return constant(math.exp(-lam), *where), constant(-math.expm1(-lam), *where)


def softmax_rows(scores, valid, causal, mask_rows):
    """The softmax in `attention.refined_softmax`, masks and all: scores (B, H, L, L), valid (B, L) or None -> P."""
    (scores,) = in_order(scores)
    P, (_, H, L, _) = cupy_library().empty_like(scores), scores.shape
    mask, rows = 0 if valid is None else valid.astype(np.uint8), scores.size // L
    arguments = (scores, mask, P, np.int64(rows), np.int32(L), np.int32(H), np.int32(causal), np.int32(mask_rows))
    by_rows("softmax_rows", scores, arguments, rows, L)
    return P


def softmax_backward(dP, P):
    """`ops.softmax_backward`: both (..., L)."""
    dP, P = in_order(dP, P)
    ds, L = cupy_library().empty_like(P), P.shape[-1]
    rows = P.size // L
    by_rows("softmax_gradient", P, (dP, P, ds, np.int64(rows), np.int32(L)), rows, L)
    return ds


def refined_softmax(scores, valid, lam, causal):
    """`attention.refined_softmax`: scores (B, H, L, L), valid (B, L) or None, lam signed -> P and its beliefs B."""
    (scores,) = in_order(scores)
    if not _blocks(scores.shape[-1]):
        P = softmax_rows(scores, valid, causal, True)
        return P, refine_rows(P, lam, causal, False)
    P, B = cupy_library().empty_like(scores), cupy_library().empty_like(scores)
    _refine_in_registers(scores, None if valid is None else valid.astype(np.uint8), P, B, lam, causal, False)
    return P, B


def _refine_in_registers(given, valid, P, B, lam, causal, include_self):
    L, heads = given.shape[-1], given.shape[-3] if given.ndim > 2 else 1
    blocks, (decays, _) = _blocks(L), _decays(lam, given)
    mask, priors = (0 if a is None else a for a in (valid, P))
    name = f"{'' if P is None else 'softmax_'}refine_{'causal_' if causal else ''}in_registers"
    arguments = (given, mask, priors, B, decays, np.int32(L), np.int32(heads), np.int32(include_self))
    kernel(name, given, L)((blocks * (given.size // (L * L)),), (32 * TEAM,), arguments)


def refine_rows(P, lam, causal, include_self, out=None):
    """`refinement.refine_rows`: beliefs B of priors P, both (..., L, L), rows of sum 1 or 0; lam signed, a
    number or (..., 1, 1). B is written to `out` if that is given.
    """
    (P,) = in_order(P)
    cupy, L = cupy_library(), P.shape[-1]
    B, N = cupy.empty_like(P) if out is None else out, P.size // (L * L)
    if _blocks(L):
        _refine_in_registers(P, None, None, B, lam, causal, include_self)
        return B
    decays, _ = _decays(lam, P)
    rows, own = N * L, np.int32(include_self)
    if causal:
        kernel("causal_scan", P)(((rows + 127) // 128,), (128,), (P, decays, B, np.int64(rows), np.int32(L), own))
        unmasked = np.int32(1), np.int32(0), np.int32(0)
        by_rows("softmax_rows", P, (B, 0, B, np.int64(rows), np.int32(L), *unmasked), rows, L)
        return B
    C, w = cupy.empty((N, L)), cupy.empty((N, L), P.dtype)
    kernel("evidence", P)(((L + 63) // 64, N), (64, 8), (P, decays, C, np.int32(L)))
    kernel("weights", P)((N,), (256,), (C, w, np.int32(L)))
    by_rows("beliefs", P, (P, C, w, decays, B, np.int64(rows), np.int32(L), own), rows, L)
    return B


def refined_softmax_backward(dB, B, P, lam, causal, include_self):
    """`attention.refined_softmax_backward`: ds, and for an array lam dlam of every matrix, float64, (..., 1, 1)."""
    dB, B, P = in_order(dB, B, P)
    cupy, L = cupy_library(), P.shape[-1]
    N, own = P.size // (L * L), np.int32(include_self)
    (decays, cs), ds, rows = _decays(lam, P), cupy.empty_like(P), N * L
    if blocks := _blocks(L):
        tax = cupy.empty((*P.shape[:-2], blocks * TEAM))
        arguments = (dB, B, P, decays, cs, ds, tax, np.int32(L), np.int32(causal), own)
        kernel("scores_gradient_in_registers", P, L)((N * blocks,), (32 * TEAM,), arguments)
    else:
        r, tax = cupy.empty(rows), cupy.empty(P.shape[:-1])
        by_rows("row_dots", P, (dB, B, r, np.int64(rows), np.int32(L)), rows, 32)
        if causal:
            arguments = (dB, B, P, r, decays, cs, ds, tax, np.int64(rows), np.int32(L), own)
            kernel("causal_gradient", P)(((rows + 127) // 128,), (128,), arguments)
            by_rows("through_softmax", P, (ds, P, np.int64(rows), np.int32(L)), rows, 32)
        else:
            g = cupy.empty(rows, P.dtype)
            kernel("column_sums", P)(((L + 63) // 64, N), (64, 8), (dB, B, r, g, np.int32(L)))
            arguments = (dB, B, P, r, g, decays, cs, ds, tax, np.int64(rows), np.int32(L), own)
            by_rows("scores_gradient", P, arguments, rows, L)
    return ds, -cupy.exp(-lam) * tax.sum(axis=-1)[..., None, None] if isinstance(lam, cupy.ndarray) else None


def product(a, b, transpose_a, transpose_b):
    """`attention.product`: a @ b of stacks of matrices of one dtype, (..., m, k) and (..., k, n) once transposed."""
    cupy = cupy_library()
    a, b = in_order(a, b)
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    n = b.shape[-2] if transpose_b else b.shape[-1]
    out = cupy.empty((*a.shape[:-2], m, n), a.dtype)
    cublas, kind = cupy.cuda.cublas, a.dtype.char
    multiply = {"f": cublas.sgemmStridedBatched, "d": cublas.dgemmStridedBatched}[kind]
    one, zero = np.ones((), kind), np.zeros((), kind)
    # cuBLAS counts columns first: it sees every matrix transposed, and out^T = b^T a^T
    multiply(
        cupy.cuda.device.get_cublas_handle(),
        *(cublas.CUBLAS_OP_T if flag else cublas.CUBLAS_OP_N for flag in (transpose_b, transpose_a)),
        n, m, k, one.ctypes.data,
        b.data.ptr, b.shape[-1], b.shape[-2] * b.shape[-1],
        a.data.ptr, a.shape[-1], a.shape[-2] * a.shape[-1],
        zero.ctypes.data, out.data.ptr, n, m * n, out.size // (m * n),
    )  # fmt: skip
    return out
