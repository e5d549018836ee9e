"""The two rivals that the paper compares with: penalties that are added to the loss of any training, each as a pair.

Both are measured layer by layer and averaged over layers; `Config.regulariser` says which, `regulariser_strength` how
much of it is added. Axis letters: B batch, H heads, L tokens, E head width, D model width.
"""

from typing import Any, NamedTuple

import numpy as np

from ..backend import array_namespace
from ..metrics.entropy import row_entropy

MARGIN = 0.2  # gamma
THRESHOLD = 0.5  # theta when training begins


class EntropyPenaltyCache(NamedTuple):
    A: Any  # (B, H, L, L)
    rows: Any  # (B, 1, L, 1) booleans, the rows that count; True for all
    tokens: Any  # (B, 1) how many these are; a number for all
    highest: Any  # (B, 1) H_max, or a number
    deviation: Any  # (B, H), 0 within the margin


def entropy_penalty(A, theta, valid=None):
    """Entropy-Reg: the mean over sequences and heads of (H - theta H_max)^2 where |H - theta H_max| > gamma H_max.

    A: (B, H, L, L) attention; theta: (H,) learned, one per head; valid: (B, L) booleans, False for padding, or None. H
    is the attention entropy (Eq. 2) of a head, the mean over its rows, H_max = log L and gamma = 0.2.

    Algorithm 1 of Jha & Reagen, *Entropy-Guided Attention for Private LLMs* (arXiv 2501.03489), which adds it with a
    strength of 1e-5 or 5e-5. It leaves open, and here is: how sequences of a batch are put together (each has its own
    penalty, and these are averaged; the code that its authors released takes each row for itself and adds the rows
    up, so its strengths are not ours), padding (rows of padding do not count, L is the number of tokens), where theta
    begins (1/2), whether H_max knows of a causal mask (it does not), and which attention is meant where it is refined:
    the refined one, which mixes the values.
    """
    xp, L = array_namespace(A), A.shape[-1]
    entropies = row_entropy(A)  # [B, H, L]
    if valid is None:
        rows, tokens, mean, highest = True, L, entropies.mean(axis=-1), float(np.log(L))
    else:
        rows, tokens = valid[:, None, :, None], xp.maximum(valid.sum(axis=-1), 1).astype(A.dtype)[:, None]
        mean = xp.where(valid[:, None], entropies, 0).sum(axis=-1) / tokens
        highest = xp.log(tokens)
    deviation = mean - theta * highest
    deviation = xp.where(abs(deviation) > MARGIN * highest, deviation, 0)
    return (deviation * deviation).mean(), EntropyPenaltyCache(A, rows, tokens, highest, deviation)


def entropy_penalty_backward(dloss, cache):
    """dloss a number -> dA (B, H, L, L), dtheta (H,)."""
    A, rows, tokens, highest, deviation = cache
    xp = array_namespace(A)
    dmean = deviation * (2 * dloss / deviation.size)
    # mean = -sum_jk A_jk log A_jk / tokens; at A = 0 the slope is infinite, and what made A let nothing of it pass
    tiny = np.finfo(A.dtype).tiny
    dA = xp.where((A > 0) & rows, -1 - xp.log(xp.maximum(A, tiny)), 0)
    dA *= (dmean / tokens)[..., None, None]
    return dA, -(dmean * highest).sum(axis=0)


class EigenPenaltyCache(NamedTuple):
    Wq: Any  # (H, E, D)
    Wk: Any  # (H, E, D)
    QQ: Any  # (H, E, E) Wq Wq^T
    KK: Any  # (H, E, E) Wk Wk^T
    trace: Any  # (H,) tr(W)


def eigen_penalty(Wq, Wk):
    """Eigen-Reg: the mean over heads of tr(W W^T) - tr(W)^2 / E, where W = W_Q W_K^T (D, D) scores two tokens, x W y^T.

    Wq, Wk: (H, E, D), the query and key maps of each head, q = Wq x. It is never negative, and no D x D matrix is made.

    LocAteR of Bao, Hataya & Karakida, *Self-attention Networks Localize When QK-eigenspectrum Concentrates* (ICML 2024,
    arXiv 2402.02098): shrink the scale of the spectrum, tr(W^2), and hold its mean, tr(W). For a symmetric W, whose
    eigenvalues are real, tr(W^2) = tr(W W^T). For others tr(W^2) is not a scale: an antisymmetric part, whose
    eigenvalues are imaginary, lowers it without limit, and Adam goes that way at any strength (two layers of width 32,
    300 steps, strength 0.001: attention entropy 0.03 nats, 2.9 to 3.4 without a penalty). Hence tr(W W^T).

    How the mean is held, and the strength, the descriptions that we have leave open. Here what the mean alone makes of
    the scale, tr(W)^2 / E, is taken off: of a symmetric W there remains E times the variance of its E eigenvalues,
    which stays the same when they all move together. The sources speak of no layer without softmax attention: here
    every layer with queries and keys has a part in it.
    """
    xp = array_namespace(Wq)
    QQ, KK = Wq @ Wq.swapaxes(-1, -2), Wk @ Wk.swapaxes(-1, -2)  # [E, D] @ [D, E]
    trace = (Wq * Wk).sum(axis=(-2, -1))
    losses = xp.einsum("hab,hab->h", QQ, KK) - trace * trace / Wq.shape[1]
    return losses.mean(), EigenPenaltyCache(Wq, Wk, QQ, KK, trace)


def eigen_penalty_backward(dloss, cache):
    """dloss a number -> dWq, dWk (H, E, D)."""
    Wq, Wk, QQ, KK, trace = cache
    H, E, _ = Wq.shape
    # sum QQ KK - tr(W)^2 / E with tr(W) = sum Wq Wk
    mean, scale = (trace / E)[:, None, None], 2 * dloss / H
    return scale * (KK @ Wq - mean * Wk), scale * (QQ @ Wk - mean * Wq)
