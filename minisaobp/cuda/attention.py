"""Attention on a GPU: softmax, refinement and their gradients, and products of stacks of matrices. Each function stands
behind the function of array code that its docstring names, which is its reference and what runs on NumPy; `tests/gpu`
compares the two.

Axis letters: N matrices or rows, B batch, H heads, L tokens.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from .launch import by_rows, cupy_library, has_clusters, in_order, items_of, kernel

TEAM = 8  # warps of each of the blocks that share a matrix
TOGETHER = 8  # rows of a warp in `causal_beliefs`


def _blocks(L):
    """How many blocks hold a matrix in registers between them (attention.cu), or 0 if it cannot be held."""
    items = items_of(L)
    if items <= 4:
        return 1
    return (4 if items == 8 else 16) if items <= 16 and has_clusters(cupy_library().cuda.runtime.getDevice()) else 0


def _decays(lam, stack):
    """e^-lambda and 1 - e^-lambda for every matrix of a stack (..., L, L), each (N,) in the stack's dtype."""
    cupy = cupy_library()
    if isinstance(lam, cupy.ndarray):
        lams = cupy.broadcast_to(lam.astype(np.float64), (*stack.shape[:-2], 1, 1)).reshape(-1)
        return cupy.exp(-lams).astype(stack.dtype), (-cupy.expm1(-lams)).astype(stack.dtype)
    return _equal_decays(
        float(lam), stack.size // stack.shape[-1] ** 2, stack.dtype.char, cupy.cuda.runtime.getDevice()
    )


@functools.lru_cache(maxsize=64)
def _equal_decays(lam, count, dtype, device):
    """`_decays` of one lambda, made once for each device."""
    return tuple(cupy_library().full(count, decay, dtype) for decay in (math.exp(-lam), -math.expm1(-lam)))


def softmax_rows(scores, valid, causal, mask_rows):
    """The softmax in `attention.refined_softmax`, masks and all: scores (B, H, L, L), valid (B, L) or None -> P."""
    (scores,) = in_order(scores)
    P, (_, H, L, _) = cupy_library().empty_like(scores), scores.shape
    mask, rows = 0 if valid is None else valid.astype(np.uint8, order="C"), scores.size // L
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


class Prior(NamedTuple):
    """What a refined softmax leaves for its gradient, beside its beliefs: P, or what makes it again."""

    P: Any  # (B, H, L, L) the softmax; None where it is made again
    scores: Any = None  # (B, H, L, L)
    mask: Any = None  # (B, L) uint8, 0 for padding, or None
    softmaxes: Any = None  # (B, H, L, 3) what makes it of every row: struct Row in attention.cu
    weights: Any = None  # (B, H, L) exp of the evidence about each label, up to a factor; None if causal


def refined_softmax(scores, valid, lam, causal):
    """`attention.refined_softmax`: scores (B, H, L, L), valid (B, L) or None, lam signed -> beliefs B, Prior."""
    (scores,) = in_order(scores)
    if not _blocks(scores.shape[-1]):
        P = softmax_rows(scores, valid, causal, True)
        return refine_rows(P, lam, causal, False), Prior(P)
    cupy, B = cupy_library(), cupy_library().empty_like(scores)
    mask = None if valid is None else valid.astype(np.uint8, order="C")
    softmaxes = cupy.empty((*scores.shape[:-1], 3), scores.dtype)
    weights = None if causal else cupy.empty(scores.shape[:-1], scores.dtype)
    arrays = scores, mask, softmaxes, weights, B, _decays(lam, scores)[0]
    _by_matrices("softmax_refine", causal, arrays, (scores.shape[1], 0))
    return B, Prior(None, scores, mask, softmaxes, weights)


def _by_matrices(name, causal, arrays, numbers):
    """Launch a kernel in which blocks have a matrix of the first array, (..., L, L), in registers."""
    first = arrays[0]
    L, at = first.shape[-1], 0
    for a in arrays:
        at |= 0 if a is None else a.data.ptr
    full = first.dtype.char == "f" and L == 32 * items_of(L) and at % 16 == 0
    name = f"{name}{'_causal' if causal else ''}{'_of_full_rows' if full else ''}_in_registers"
    arguments = *[0 if a is None else a for a in arrays], np.int32(L), *[np.int32(n) for n in numbers]
    kernel(name, first, L)((_blocks(L) * (first.size // (L * L)),), (32 * TEAM,), arguments)


def refine_rows(P, lam, causal, include_self, out=None):
    """`refinement.refine_rows`: beliefs B of priors P, both (..., L, L), rows of sum 1 or 0; lam signed, a
    number or (..., 1, 1). B is written to `out` if that is given.
    """
    (P,) = in_order(P)
    cupy, L = cupy_library(), P.shape[-1]
    B, N = cupy.empty_like(P) if out is None else out, P.size // (L * L)
    if _blocks(L):
        _by_matrices("refine", causal, (P, None, None, None, B, _decays(lam, P)[0]), (1, include_self))
        return B
    decays, _ = _decays(lam, P)
    rows, own, rest = N * L, np.int32(include_self), _rests(P, decays)
    if causal:
        groups = -(-L // TOGETHER)
        C = cupy.empty((N, groups, L))
        kernel("causal_evidence", P)(((rows + 127) // 128,), (128,), (P, rest, decays, C, np.int64(rows), np.int32(L)))
        arguments = (P, rest, C, decays, B, np.int64(N * groups), np.int32(L), own)
        by_rows("causal_beliefs", P, arguments, N * groups, L)
        return B
    C, w = cupy.empty((N, L)), cupy.empty((N, L), P.dtype)
    kernel("evidence", P)(((L + 63) // 64, N), (64, 8), (P, rest, decays, C, np.int32(L)))
    kernel("weights", P)((N,), (256,), (C, w, np.int32(L)))
    by_rows("beliefs", P, (P, rest, C, w, decays, B, np.int64(rows), np.int32(L), own), rows, L)
    return B


def _rests(P, decays):
    """What the rows of P (..., L, L) have beside an entry near 1, where decays are small, and room for it elsewhere."""
    rest, L = cupy_library().empty(P.shape[:-1]), P.shape[-1]
    by_rows("rests", P, (P, decays, rest, np.int64(rest.size), np.int32(L)), rest.size, 32)
    return rest


def refined_softmax_backward(dB, B, prior, lam, causal):
    """`attention.refined_softmax_backward`: ds, and for an array lam dlam of every matrix, float64, (..., 1, 1)."""
    dB, B = in_order(dB, B)
    cupy, L, P = cupy_library(), B.shape[-1], prior.P
    N, learned = B.size // (L * L), isinstance(lam, cupy.ndarray)
    (decays, cs), ds, rows = _decays(lam, B), cupy.empty_like(B), N * L
    if P is None:
        tax = cupy.empty((*B.shape[:-2], _blocks(L) * TEAM)) if learned else None
        arrays = dB, B, prior.scores, prior.mask, prior.softmaxes, prior.weights, decays, cs, ds, tax
        name = "scores_and_lambda_gradient" if learned else "scores_gradient"
        _by_matrices(name, causal, arrays, (B.shape[1],))
    else:
        rest, r, tax = _rests(P, decays), cupy.empty(rows), cupy.empty(P.shape[:-1])
        by_rows("row_dots", P, (dB, B, r, np.int64(rows), np.int32(L)), rows, 32)
        if causal:
            arguments = (dB, B, P, rest, r, decays, cs, ds, tax, np.int64(rows), np.int32(L))
            kernel("causal_gradient", P)(((rows + 127) // 128,), (128,), arguments)
            by_rows("through_softmax", P, (ds, P, np.int64(rows), np.int32(L)), rows, 32)
        else:
            g = cupy.empty(rows, P.dtype)
            kernel("column_sums", P)(((L + 63) // 64, N), (64, 8), (dB, B, r, g, np.int32(L)))
            arguments = (dB, B, P, rest, r, g, decays, cs, ds, tax, np.int64(rows), np.int32(L))
            by_rows("scores_gradient", P, arguments, rows, L)
    return ds, -cupy.exp(-lam) * tax.sum(axis=-1)[..., None, None] if learned else None


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
