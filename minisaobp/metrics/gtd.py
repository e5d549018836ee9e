"""Eqs. 12-14: indirect attention, Global Token Dependency (GTD) and its gradient, indirect entropy; GTD across layers.

Axis letters: L tokens. A^t holds the paths of t hops through the attention graph.

Every idempotent A (A A = A) has the same GTD, 2.439^2 / (1 + 2.439^2) = 0.856 at beta = 0.9 and K = 4: the identity,
the uniform matrix and the collapse onto one token. So a GTD says nothing about collapse by itself. Read it together
with the indirect entropy, which is 0, log L and 0 for these three.
"""

import math
import numbers

import numpy as np

from ..backend import array_namespace, attention_array, row_sum, valid_array
from .entropy import mean_over_rows, row_entropy


def indirect_attention(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 12: G = sum over t = 2..K of beta^(t-1) A^t, with K = hops; shape and dtype of A, (..., L, L).

    hops may be math.inf: then G = beta A^2 (I - beta A)^-1, which needs beta times every row sum below 1.
    valid: (..., L) booleans, False for padding: paths neither start at, end at nor pass through padded tokens.
    Raises ValueError or TypeError on what is not an attention matrix, beta <= 0 or hops < 2.

    >>> float(indirect_attention(np.eye(3))[0, 0].round(6))            # 0.9 + 0.81 + 0.729
    2.439
    """
    A, dtype, _ = _prepare(A, beta, hops, valid)
    return _indirect(A, beta, hops).astype(dtype, copy=False)


def gtd(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 13: Global Token Dependency, ||G||^2 / (||A||^2 + ||G||^2) in Frobenius norms; shape A.shape[:-2].

    The share of the attention graph's energy that sits in paths of two and more hops, in [0, 1). Arguments and errors
    as `indirect_attention`. NaN for a matrix of zeros.

    >>> [float(gtd(M).round(6)) for M in (np.eye(4), np.full((4, 4), 0.25), np.eye(4)[[1, 2, 3, 0]])]
    [0.856089, 0.856089, 0.666393]
    """
    A, _, _ = _prepare(A, beta, hops, valid)
    return _share(_energy(A), _energy(_indirect(A, beta, hops)))


def gtd_backward(dgtd, A, beta=0.9, hops=4, *, valid=None):
    """Gradient of sum(dgtd * gtd(A, ...)) with respect to every entry of A, (..., L, L) in A's dtype.

    dgtd: the shape of the GTD, A.shape[:-2], or a number. Arguments and errors as `gtd`; a matrix of zeros has
    gradient zero.

    >>> dA = gtd_backward(1.0, np.eye(3))
    >>> bool(dA[0, 1] == 0 and dA[0, 0] > 0)
    True
    """
    A, dtype, valid = _prepare(A, beta, hops, valid)
    xp = array_namespace(A)
    steps = _horner(A, beta, hops) if hops < math.inf else [_indirect(A, beta, hops)]
    G = steps[-1]
    direct, indirect = (_energy(x)[..., None, None] for x in (A, G))
    total = xp.where(direct > 0, direct + indirect, np.inf)
    dgtd = xp.asarray(dgtd, A.dtype)[..., None, None]
    # gtd = N / (D + N), D = sum A^2, N = sum G^2
    dG = 2 * dgtd * direct / total**2 * G
    dA = -2 * dgtd * indirect / total**2 * A
    if hops == math.inf:
        # (I - beta A) G = beta A^2
        dright = xp.linalg.solve(_identity_less(A, beta).swapaxes(-1, -2), dG)
        dsquare = beta * dright
        dA = dA + beta * dright @ G.swapaxes(-1, -2)
        dA += dsquare @ A.swapaxes(-1, -2) + A.swapaxes(-1, -2) @ dsquare
    else:
        # G = beta A X_last and X_next = A + beta A X, from X = A on
        dX = dG
        for n, X in enumerate(reversed(steps[:-1])):
            if n:
                dA += dX
            dA += beta * dX @ X.swapaxes(-1, -2)
            dX = beta * A.swapaxes(-1, -2) @ dX
        dA += dX
    if valid is not None:
        dA = dA * (valid[..., :, None] & valid[..., None, :])
    return dA.astype(dtype, copy=False)


def cross_layer_gtd(maps, beta=0.9, hops=4, *, valid=None):
    """GTD of paths that take one hop per layer; maps (layers, ..., L, L) -> (layers, ...).

    The paper reports it (Table 6) without a definition. Here layer n has the direct attention A_n and the indirect
    G_n = sum over t = 2..min(K, n) of beta^(t-1) A_n A_(n-1) ... A_(n-t+1), the paths from its tokens down through the
    layers below; GTD_n = ||G_n||^2 / (||A_n||^2 + ||G_n||^2). The first layer has no indirect path: 0. With the same A
    in every layer, GTD_n is that of `gtd` for hops = min(K, n). Other arguments and errors as `gtd`.

    >>> cross_layer_gtd(np.stack([np.eye(4)] * 4)).round(6)[[0, 3]]
    array([0.      , 0.856089])
    """
    maps, _, _ = _prepare(maps, beta, hops, valid)
    if maps.ndim < 3:
        raise ValueError(f"maps: expected shape (layers, ..., L, L), got {maps.shape}")
    xp = array_namespace(maps)
    result = xp.zeros(maps.shape[:-2], maps.dtype)
    for n in range(len(maps)):
        path, G = maps[n], xp.zeros_like(maps[n])
        for below in range(n - 1, -1 if hops == math.inf else max(n - hops, -1), -1):
            path = beta * (path @ maps[below])
            G += path
        result[n] = _share(_energy(maps[n]), _energy(G))
    return result


def indirect_entropy(A, beta=0.9, hops=4, *, valid=None):
    """Eq. 14: mean row entropy, in nats, of G with its rows normalised; shape A.shape[:-2].

    Arguments and errors as `indirect_attention`; rows of padded tokens do not count.

    >>> [float(indirect_entropy(M).round(6)) for M in (np.eye(4), np.full((4, 4), 0.25))]
    [0.0, 1.386294]
    """
    A, _, valid = _prepare(A, beta, hops, valid)
    return mean_over_rows(_row_entropy_of(_indirect(A, beta, hops)), valid)


def idempotent_gtd(beta=0.9, hops=4):
    """The GTD of every A with A A = A, such as the identity, uniform attention and a full collapse.

    >>> round(idempotent_gtd(), 6)
    0.856089
    """
    if hops == math.inf:
        return (beta / (1 - beta)) ** 2 / (1 + (beta / (1 - beta)) ** 2)
    G = sum(beta**t for t in range(1, hops))
    return G * G / (1 + G * G)


def gtd_and_indirect_entropy(A, beta=0.9, hops=4, *, valid=None):
    """Both at once, for half the work: what `gtd` and `indirect_entropy` give."""
    A, _, valid = _prepare(A, beta, hops, valid)
    G = _indirect(A, beta, hops)
    return _share(_energy(A), _energy(G)), mean_over_rows(_row_entropy_of(G), valid)


def _indirect(A, beta, hops):
    if hops == math.inf:
        xp = array_namespace(A)
        highest = float(beta * A.sum(axis=-1).max()) if A.size else 0.0
        if not highest < 1:
            raise ValueError(f"beta: with hops=inf expected beta times every row sum below 1, got {highest:g}")
        return xp.linalg.solve(_identity_less(A, beta), beta * (A @ A))
    G = A  # Horner: G = beta A (A + beta A (A + ...)), one product per hop
    for _ in range(hops - 2):
        G = A + beta * (A @ G)
    return beta * (A @ G)


def _horner(A, beta, hops):
    """Every X on the way of `_indirect`, then G."""
    steps = [A]
    for _ in range(hops - 2):
        steps.append(A + beta * (A @ steps[-1]))
    return [*steps, beta * (A @ steps[-1])]


def _identity_less(A, beta):
    return array_namespace(A).eye(A.shape[-1], dtype=A.dtype) - beta * A


def _row_entropy_of(G):
    """Entropy of every row of G, normalised: with mass m, log m - (sum of g log g) / m."""
    xp = array_namespace(G)
    mass = row_sum(G)[..., 0]
    mass = xp.where(mass > 0, mass, 1)
    return (row_entropy(G) / mass + xp.log(mass)).clip(0)


def _energy(x):
    """Squared Frobenius norm."""
    return array_namespace(x).einsum("...jk,...jk->...", x, x)


def _share(direct, indirect):
    xp = array_namespace(direct)
    return xp.where(direct > 0, indirect / xp.where(direct > 0, direct + indirect, 1), np.nan)


def _prepare(A, beta, hops, valid):
    if isinstance(beta, bool) or not isinstance(beta, numbers.Real) or not 0 < beta < math.inf:
        raise ValueError(f"beta: expected a finite number > 0, got {beta!r}")
    if hops != math.inf and (isinstance(hops, bool) or not isinstance(hops, numbers.Integral) or hops < 2):
        raise ValueError(f"hops: expected a whole number >= 2 or math.inf, got {hops!r}")
    A = attention_array(A)
    valid = valid_array(valid, A)
    dtype = A.dtype
    A = A.astype(np.float32) if dtype == np.float16 else A
    if valid is not None:
        A = A * (valid[..., :, None] & valid[..., None, :])
    return A, dtype, valid
