"""The operations of a transformer, each as a pair: y, cache = f(x, ...) and dx, ... = f_backward(dy, cache).

Axis letters: N rows (all leading axes together), I inputs and O outputs of a linear map, D model width, L tokens,
V vocabulary. A gradient is called d + the name of what it belongs to and has its shape. Nothing is remembered outside
the cache, so two forwards before a backward are fine. No function writes to its arguments.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import cuda
from ..backend import array_namespace, row_dot, row_sum

# ---- linear ---------------------------------------------------------------------------------------------------------


class LinearCache(NamedTuple):
    x: Any  # (..., I)
    W: Any  # (O, I), the layout of torch.nn.Linear


def linear(x, W, b):
    """y = x W^T + b; x (..., I), W (O, I), b (O,) -> (..., O)."""
    y = x.reshape(-1, x.shape[-1]) @ W.T  # [N, I] @ [I, O] -> [N, O]: one product, not one for each sequence
    y += b
    return y.reshape(*x.shape[:-1], -1), LinearCache(x, W)


def linear_backward(dy, cache):
    x, W = cache
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    # y = x W^T + b
    dx = dy2 @ W  # [N, O] @ [O, I] -> [N, I]
    dW = dy2.T @ x2  # [O, N] @ [N, I] -> [O, I]
    db = dy2.sum(axis=0) if array_namespace(dy) is np else cuda.sum_of_rows(dy2)
    return dx.reshape(x.shape), dW, db


# ---- layer normalisation --------------------------------------------------------------------------------------------


class LayerNormCache(NamedTuple):
    normed: Any  # (..., D) (x - mean) / sigma
    rsigma: Any  # (..., 1) 1 / sqrt(variance + eps)
    gamma: Any  # (D,)


def layer_norm(x, gamma, beta, eps):
    """y = gamma (x - mean) / sqrt(variance + eps) + beta over the last axis, biased variance; x (..., D)."""
    xp = array_namespace(x)
    if xp is not np:
        y, normed, rsigma = cuda.layer_norm(x, gamma, beta, eps)
        return y, LayerNormCache(normed, rsigma, gamma)
    normed = x - x.mean(axis=-1, keepdims=True)
    variance = row_dot(normed, normed) / x.shape[-1]
    rsigma = 1 / xp.sqrt(variance + x.dtype.type(eps))
    normed *= rsigma
    y = normed * gamma
    y += beta
    return y, LayerNormCache(normed, rsigma, gamma)


def layer_norm_backward(dy, cache):
    normed, rsigma, gamma = cache
    if array_namespace(dy) is not np:
        return cuda.layer_norm_backward(dy, normed, rsigma, gamma)
    D = dy.shape[-1]
    # y = gamma normed + beta
    dgamma = np.einsum("nd,nd->d", dy.reshape(-1, D), normed.reshape(-1, D))
    dbeta = dy.reshape(-1, D).sum(axis=0)
    dnormed = dy * gamma
    # normed = (x - mean) rsigma: its own mean and length along the row take no gradient
    along = row_dot(dnormed, normed) / D
    dx = dnormed
    dx -= dnormed.mean(axis=-1, keepdims=True)
    dx -= normed * along
    dx *= rsigma
    return dx, dgamma, dbeta


# ---- GELU -----------------------------------------------------------------------------------------------------


def _mills_ratio(x):
    """(1 - Phi(x)) / phi(x) of the standard normal distribution, for one float x >= 0."""
    if x < 4:
        return math.erfc(x / math.sqrt(2)) * math.sqrt(math.pi / 2) * math.exp(x * x / 2)
    fraction = x  # Laplace's continued fraction x + 1/(x + 2/(x + ...)): 100 terms reach 1e-16 from x = 4 on
    for n in range(100, 0, -1):
        fraction = x + n / fraction
    return 1 / fraction


def _tail_polynomial(p, degree):
    """Coefficients in u = 2 / (1 + p x) - 1, highest first, of (1 - Phi(x)) exp(x^2/2) for x >= 0.

    NumPy has no erf. The Mills ratio is smooth in u, so interpolating it at Chebyshev nodes once, here, gives
    Phi at every x for one exponential and a short polynomial; the same exponential is what the derivative needs.
    """
    nodes = np.cos((np.arange(degree + 1) + 0.5) * np.pi / (degree + 1))
    values = [_mills_ratio((2 / (1 + u) - 1) / p) / math.sqrt(2 * math.pi) for u in nodes]
    return np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(nodes, values, degree))[::-1].tolist()


# (p, coefficients): |error of Phi| < 2e-8 before rounding for float32, < 1e-15 for float64
_TAIL = {"float32": (0.3, _tail_polynomial(0.3, 8)), "float64": (0.2, _tail_polynomial(0.2, 20))}
_BLOCK = 1 << 15  # numbers worked on at a time: four buffers of them stay in a CPU's second-level cache


class GeluCache(NamedTuple):
    slope: Any  # (..., ) dy/dx


def gelu(x, tanh=False):
    """Exact GELU, y = x Phi(x) with Phi the standard normal distribution function; any shape, float32 or float64.

    tanh: GPT-2's instead, y = x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    if array_namespace(x) is not np:
        return _bias_gelu(x, x.dtype.type(0), tanh)
    if tanh:
        return _gelu_tanh(x)
    flat = x.reshape(-1)
    y, slope = np.empty_like(flat), np.empty_like(flat)
    p, (leading, *others) = _TAIL[x.dtype.name]
    for a in range(0, flat.size, _BLOCK):
        v, cdf, density = flat[a : a + _BLOCK], y[a : a + _BLOCK], slope[a : a + _BLOCK]
        u = np.abs(v)
        u *= p
        u += 1
        np.divide(2, u, out=u)
        u -= 1
        np.multiply(u, leading, out=cdf)
        cdf += others[0]
        for coefficient in others[1:]:
            cdf *= u
            cdf += coefficient
        np.multiply(v, v, out=density)
        density *= -0.5
        np.exp(density, out=density)
        cdf *= density  # 1 - Phi(|x|)
        np.subtract(0.5, cdf, out=cdf)
        np.copysign(cdf, v, out=cdf)
        cdf += 0.5  # Phi(x)
        density *= v
        density *= 1 / math.sqrt(2 * math.pi)
        density += cdf  # dy/dx = Phi(x) + x phi(x)
        cdf *= v
    return y.reshape(x.shape), GeluCache(slope.reshape(x.shape))


def _gelu_tanh(x):
    square = x * x
    tanh = square * 0.044715
    tanh += 1
    tanh *= x
    tanh *= math.sqrt(2 / math.pi)
    np.tanh(tanh, out=tanh)
    # dy/dx = (1 + tanh + x (1 - tanh^2) du/dx) / 2
    slope = square
    slope *= 3 * 0.044715
    slope += 1
    slope *= math.sqrt(2 / math.pi)
    slope *= x
    slope *= 1 - tanh * tanh
    slope += tanh
    slope += 1
    slope *= 0.5
    tanh += 1
    tanh *= x
    tanh *= 0.5
    return tanh, GeluCache(slope)


def gelu_backward(dy, cache):
    return dy * cache.slope


def linear_gelu(x, W, b, tanh=False):
    """`linear`, then `gelu`. On a GPU the bias is added on the way to the GELU."""
    if array_namespace(x) is np:
        y, linear_cache = linear(x, W, b)
        y, gelu_cache = gelu(y, tanh)
    else:
        y = (x.reshape(-1, x.shape[-1]) @ W.T).reshape(*x.shape[:-1], -1)
        linear_cache = LinearCache(x, W)
        y, gelu_cache = _bias_gelu(y, b, tanh)
    return y, (linear_cache, gelu_cache)


def linear_gelu_backward(dy, cache):
    linear_cache, gelu_cache = cache
    return linear_backward(gelu_backward(dy, gelu_cache), linear_cache)


def _bias_gelu(x, b, tanh):
    y, slope = cuda.bias_gelu(x, b, tanh)
    return y, GeluCache(slope)


# ---- softmax --------------------------------------------------------------------------------------------------------


class SoftmaxCache(NamedTuple):
    P: Any  # (..., L)


def softmax(s):
    """P_k = exp(s_k) / sum_k' exp(s_k') over the last axis. A row of -inf has no probability to give: it is zero."""
    xp = array_namespace(s)
    top = row_max(s)[..., None]
    P = s - xp.where(top > -np.inf, top, 0)
    xp.exp(P, out=P)
    total = row_sum(P)
    P /= xp.where(total > 0, total, 1)
    return P, SoftmaxCache(P)


def softmax_backward(dP, cache):
    P = cache.P
    if array_namespace(P) is not np:
        return cuda.softmax_backward(dP, P)
    # dP_k/ds_l = P_k (delta_kl - P_l)
    ds = dP - row_dot(dP, P)
    ds *= P
    return ds


def row_max(x):
    """Largest entry along the last axis."""
    xp = array_namespace(x)
    # np.max looks out for NaN and is four times slower on short rows than fmax, which CuPy cannot reduce with
    return np.fmax.reduce(x, axis=-1) if xp is np else xp.max(x, axis=-1)


# ---- tanh -----------------------------------------------------------------------------------------------------------


def tanh(x):
    """Hyperbolic tangent of any array; the cache is the result."""
    y = array_namespace(x).tanh(x)
    return y, y


def tanh_backward(dy, y):
    return dy * (1 - y * y)


# ---- dropout --------------------------------------------------------------------------------------------------------


class DropoutCache(NamedTuple):
    kept: Any  # (...) booleans
    scale: float


def dropout(x, rate, rng):
    """y = x / (1 - rate) where a number is kept, with probability 1 - rate, else 0; any shape.

    rng: a generator of x's library, or None outside training. Where nothing is dropped, y is x and the cache None.
    """
    if rng is None or not rate:
        return x, None
    kept, scale = rng.random(x.shape, np.float32) >= rate, 1 / (1 - rate)
    y = x * kept
    y *= scale
    return y, DropoutCache(kept, scale)


def dropout_backward(dy, cache):
    if cache is None:
        return dy
    dx = dy * cache.kept
    dx *= cache.scale
    return dx


# ---- embedding ------------------------------------------------------------------------------------------------------


def embedding(ids, table):
    """Rows of the table (V, D) at ids (...), integers in [0, V) -> (..., D)."""
    return table[ids], (ids, table.shape)


def embedding_backward(dy, cache):
    """dtable (V, D): row v is the sum of dy wherever ids = v, in the order of the ids, so a run repeats bit for bit."""
    ids, shape = cache
    xp = array_namespace(dy)
    dtable = xp.zeros(shape, dy.dtype)
    ids, dy = ids.reshape(-1), dy.reshape(-1, shape[-1])
    if xp is not np:
        return cuda.embedding_backward(dy, ids, dtable)
    order = np.argsort(ids, kind="stable")  # sorted, then one sum per run of equal ids: np.add.at takes twice as long
    ordered = ids[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    dtable[ordered[starts]] = np.add.reduceat(dy[order], starts, axis=0)
    return dtable


# ---- losses ---------------------------------------------------------------------------------------------------------


class CrossEntropyCache(NamedTuple):
    P: Any  # (N, V)
    labels: Any  # (N,)


def cross_entropy(logits, labels):
    """Mean of -log softmax(logits)_label in nats; logits (N, V), labels (N,) integers in [0, V); N >= 1."""
    xp = array_namespace(logits)
    if xp is not np:
        losses, P = cuda.cross_entropy(logits, labels)
        return losses.mean(), CrossEntropyCache(P, labels)
    P, _ = softmax(logits)
    rows = xp.arange(len(labels))
    top = row_max(logits)
    # log of the sum of exponentials, read off the largest probability: P_top = 1 / sum exp(s - s_top)
    losses = top - xp.log(row_max(P)) - logits[rows, labels]
    return losses.mean(), CrossEntropyCache(P, labels)


def cross_entropy_backward(dloss, cache):
    P, labels = cache
    xp = array_namespace(P)
    dlogits = P * (dloss / len(labels))
    dlogits[xp.arange(len(labels)), labels] -= dloss / len(labels)
    return dlogits


class SquaredErrorCache(NamedTuple):
    difference: Any  # (N, C)


def squared_error(scores, labels):
    """Mean of (scores - labels)^2; both (N, C)."""
    difference = scores - labels
    return (difference * difference).mean(), SquaredErrorCache(difference)


def squared_error_backward(dloss, cache):
    return cache.difference * (2 * dloss / cache.difference.size)
