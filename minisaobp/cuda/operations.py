"""LayerNorm, GELU, cross-entropy, embeddings and AdamW on a GPU. Each function stands behind the function of array code
that its docstring names, which is its reference and what runs on NumPy; `tests/gpu` compares the two.

Axis letters: D width, V vocabulary, (...) all leading axes.
"""

import functools

import numpy as np

from .launch import by_rows, cupy_library, in_order, kernel


def layer_norm(x, gamma, beta, eps):
    """`ops.layer_norm`: x (..., D) -> y, normed (..., D), rsigma (..., 1)."""
    x, gamma, beta = in_order(x, gamma, beta)
    cupy, D = cupy_library(), x.shape[-1]
    y, normed, rsigma = cupy.empty_like(x), cupy.empty_like(x), cupy.empty((*x.shape[:-1], 1), x.dtype)
    rows = x.size // D
    arguments = (x, gamma, beta, x.dtype.type(eps), y, normed, rsigma, np.int64(rows), np.int32(D))
    by_rows("layer_norm", x, arguments, rows, D)
    return y, normed, rsigma


def layer_norm_backward(dy, normed, rsigma, gamma):
    """`ops.layer_norm_backward`: dx (..., D), dgamma (D,), dbeta (D,)."""
    dy, normed, rsigma, gamma = in_order(dy, normed, rsigma, gamma)
    dx, D = cupy_library().empty_like(dy), dy.shape[-1]
    rows = dy.size // D
    by_rows("layer_norm_gradient", dy, (dy, normed, rsigma, gamma, dx, np.int64(rows), np.int32(D)), rows, D)
    return dx, *_column_sums(dy, normed)


def sum_of_rows(dy):
    """dy.sum(axis=0) for dy (N, D): CuPy's own takes six times as long."""
    (dy,) = in_order(dy)
    return _column_sums(dy, None)[1]


def _column_sums(dy, normed):
    """Sum over all rows of dy * normed, if there is one, and of dy, each (D,): within chunks of rows, then over all."""
    cupy, D = cupy_library(), dy.shape[-1]
    rows = dy.size // D
    chunks = min(256, (rows + 31) // 32)
    chunk = (rows + chunks - 1) // chunks
    a, b = cupy.empty((chunks, D), dy.dtype), cupy.empty((chunks, D), dy.dtype)
    threads = min(128, 32 * ((D + 31) // 32))
    grid = ((D + threads - 1) // threads, chunks)
    kernel("partial_sums", dy)(
        grid, (threads,), (dy, 0 if normed is None else normed, a, b, np.int64(rows), np.int32(D), np.int32(chunk))
    )
    whole = cupy.empty(D, dy.dtype), cupy.empty(D, dy.dtype)
    for part, total in zip((a, b), whole, strict=True):
        if part is b or normed is not None:
            arguments = (part, 0, 0, total, np.int64(chunks), np.int32(D), np.int32(chunks))
            kernel("partial_sums", dy)((grid[0], 1), (threads,), arguments)
    return whole


@functools.cache
def _gelu(tanh):
    slope = {
        False: """
        T cdf = T(0.5) * erfc(-u * T(0.70710678118654752));
        slope = cdf + u * exp(T(-0.5) * u * u) * T(0.39894228040143268);
        y = u * cdf
        """,
        True: """
        T a = tanh(T(0.79788456080286536) * u * (1 + T(0.044715) * u * u));
        slope = T(0.5) * (1 + a + u * (1 - a * a) * T(0.79788456080286536) * (1 + T(0.134145) * u * u));
        y = T(0.5) * u * (1 + a)
        """,
    }[tanh]
    name = f"minisaobp_bias_gelu{'_tanh' if tanh else ''}"
    return cupy_library().ElementwiseKernel("T x, T bias", "T y, T slope", "T u = x + bias;" + slope, name)


def bias_gelu(x, bias, tanh):
    """`ops.gelu` of x + bias: y and dy/dx, of x's shape; bias (D,) or a number."""
    return _gelu(tanh)(x, bias)


def cross_entropy(logits, labels):
    """`ops.cross_entropy` row by row: losses (N,) and probabilities (N, V)."""
    (logits,) = in_order(logits)
    cupy = cupy_library()
    P, losses = cupy.empty_like(logits), cupy.empty(len(logits), logits.dtype)
    arguments = (logits, labels.astype(np.int64), P, losses, np.int32(logits.shape[1]))
    kernel("cross_entropy", logits)((len(logits),), (512,), arguments)
    return losses, P


def embedding_backward(dy, ids, dtable):
    """`ops.embedding_backward`: adds up rows of dy (n, D) into dtable (V, D), zero before, in the order of ids (n,)."""
    (dy,) = in_order(dy)
    cupy = cupy_library()
    order = cupy.argsort(ids.astype(np.int64))
    order = order.astype(np.int64)
    arguments = (dy, ids.astype(np.int64)[order], order, dtable, np.int32(len(ids)), np.int32(dy.shape[1]))
    kernel("embedding_gradient", dy)((len(ids),), (min(256, 32 * ((dy.shape[1] + 31) // 32)),), arguments)
    return dtable


@functools.cache
def _adamw():
    return cupy_library().ElementwiseKernel(
        "T g, float64 step, float64 root, float64 beta1, float64 beta2, float64 eps, float64 keep, int64 decayed",
        "T w, T m, T v",
        """
        m = m * T(beta1) + T(1 - beta1) * g;
        v = v * T(beta2) + T(1 - beta2) * g * g;
        T before = i < decayed ? w * T(keep) : w;
        w = before - T(step) * m / (sqrt(v) * T(root) + T(eps))
        """,
        "minisaobp_adamw",
    )


def adamw(weights, gradient, mean, square, step, root, betas, eps, keep, decayed):
    """`AdamW.update` in one pass over the flat arrays."""
    _adamw()(gradient, step, root, *betas, eps, keep, decayed, weights, mean, square)
