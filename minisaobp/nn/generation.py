"""Text from the decoder, one token after the other, each for the price of one row of attention.

A token's queries meet the keys and values of all tokens before it, so these are kept. What refinement adds is exact and
small: Appendix C's causal form lets token j hear i < j alone, so of all earlier rows of attention it needs only the
evidence C_k = sum_{i<j} log t_ik, one running sum per head and key. BP-ElemMul (Eq. 15) multiplies row j with every
earlier row, so these rows are kept, L^2 numbers a head. The simplified variants need nothing but keys and values, or
less.

Axis letters: B batch, H heads, L tokens so far, E head width, V vocabulary.
"""

import math

import numpy as np

from ..backend import array_namespace
from ..bp.multistep import normalised_in_logs
from ..bp.refinement import potts_messages
from . import decoder, ops
from .attention import REFINED, elu_features, softmax_of


class Memory:
    """What one layer keeps of the tokens so far, with room for those to come."""

    def __init__(self, cache, room):
        """cache: AttentionCache of the prompt; room: how many tokens in all."""
        xp, variant = array_namespace(cache.v), cache.variant
        B, H, L, E = cache.v.shape
        self.variant, self.own, self.length = variant, cache.own, L
        self.k, self.v = (xp.zeros((B, H, room, E), cache.v.dtype) for _ in range(2))
        self.v[..., :L, :] = cache.v
        if cache.k is not None:
            self.k[..., :L, :] = cache.k
        if variant in ("high", "low"):
            self._signed = -self.own if variant == "low" else self.own
            self.evidence = xp.zeros((B, H, 1, room))  # float64: it only grows
            t = potts_messages(softmax_of(cache.weights), self._signed)
            self.evidence[..., :L] = xp.log(t).sum(axis=-2, keepdims=True, dtype=np.float64)
        if variant == "elemmul":
            self.rows = xp.zeros((B, H, room, room), cache.v.dtype)
            self.rows[..., :L, :L] = softmax_of(cache.weights)

    def attend(self, qkv):
        """`attention` for one more token: qkv (B, 1, 3, H, E) -> mixed (B, 1, H, E), A (B, H, 1, L), no cache."""
        *qk, v = (qkv[:, :, n].transpose(0, 2, 1, 3) for n in range(qkv.shape[2]))
        self.v[..., self.length, :] = v[:, :, 0]
        if qk:
            self.k[..., self.length, :] = qk[1][:, :, 0]
        self.length += 1
        A = self._row(qk[0] if qk else None, self.length)
        return (A @ self.v[..., : self.length, :]).transpose(0, 2, 1, 3), A, None

    def _row(self, q, L):
        """The last row of attention, (B, H, 1, L); q (B, H, 1, E), or None where there are no queries."""
        xp = array_namespace(self.v)
        B, H, _, E = self.v.shape
        if self.variant == "none":
            A = xp.zeros((B, H, 1, L), self.v.dtype)
            A[..., -1] = 1
            return A
        if self.variant == "uniform":
            return xp.full((B, H, 1, L), 1 / L, self.v.dtype)
        if self.variant == "fixed":
            A, _ = ops.softmax(self.own[:, L - 1 : L, :L])
            return xp.tile(A, (B, 1, 1, 1))
        k = self.k[..., :L, :].swapaxes(-1, -2)
        if self.variant == "linear":
            A = elu_features(q) @ elu_features(k)
            return A / A.sum(axis=-1, keepdims=True)
        A, _ = ops.softmax(q * q.dtype.type(1 / math.sqrt(E)) @ k)  # [1, E] @ [E, L]
        return self._refined(A, L) if self.variant in REFINED else A

    def _refined(self, P, L):
        if self.variant == "elemmul":
            self.rows[..., L - 1, :L] = P[..., 0, :]
            B = P @ self.rows[..., :L, :L].swapaxes(-1, -2)
            return B / B.sum(axis=-1, keepdims=True)
        B, _ = normalised_in_logs(P, self.evidence[..., :L])
        self.evidence[..., :L] += array_namespace(P).log(potts_messages(P, self._signed))
        return B.astype(P.dtype)


def generate(ids, w, config, tokens, temperature=0.0, top_k=None, rng=None):
    """Yields `tokens` times the next token of every sequence, (B,); ids (B, L), the prompts, all of one length.

    temperature 0 takes the likeliest token; otherwise one is drawn by rng from softmax(scores / temperature), from the
    top_k likeliest if that is given.
    """
    hidden, _, (_, _, caches, _) = decoder.decode(ids, w, config)
    layers = [w.under(f"transformer.h.{n}.") for n in range(config.num_hidden_layers)]
    memories = [Memory(cache.attention, ids.shape[1] + tokens) for cache in caches]
    table = w["transformer.wte.weight"]
    for n in range(tokens):
        chosen = _choose(hidden[:, -1] @ table.T, temperature, top_k, rng)
        yield chosen
        x = table[chosen][:, None] + w["transformer.wpe.weight"][ids.shape[1] + n]  # [B, 1, D]
        e = x
        for layer, memory in zip(layers, memories, strict=True):
            x, _, _ = decoder.block(x, e if memory.variant == "static" else None, layer, config, memory.attend)
        hidden, _ = decoder.final_norm(x, w, config)


def _choose(scores, temperature, top_k, rng):
    """One token of every row of scores (B, V)."""
    xp = array_namespace(scores)
    if not temperature:
        return scores.argmax(axis=-1)
    scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest token alone
        scores = (scores - scores.max(axis=-1, keepdims=True)) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        least = xp.partition(scores, -top_k, axis=-1)[:, -top_k, None]
        scores = xp.where(scores >= least, scores, -np.inf)
    P, _ = ops.softmax(scores)
    below = xp.cumsum(P, axis=-1)
    below /= below[:, -1:]  # exactly 1 at the end: a number drawn is always below it
    return (below <= rng.random((len(P), 1))).sum(axis=-1)
