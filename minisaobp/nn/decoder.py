"""A GPT-2-style decoder, forward and backward: embeddings, pre-LayerNorm causal blocks, tied language-model head.

Axis letters: B batch, L tokens, D model width, H heads, F feed-forward width, V vocabulary, N labelled tokens.
`w` holds parameters and `g` their gradients, by Hugging Face's names below the part they belong to. GPT-2 stores the
weight of a linear map as (inputs, outputs), the transpose of `ops.linear`'s.
"""

from typing import Any, NamedTuple

from ..backend import array_namespace
from . import ops
from .attention import attention, attention_backward


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order in which the forward pass meets them."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (config.max_position_embeddings, D)}
    for n in range(config.num_hidden_layers):
        layer = f"transformer.h.{n}."
        for name, shape in {
            "ln_1": (D,),
            "attn.c_attn": (D, 3 * D),
            "attn.c_proj": (D, D),
            "ln_2": (D,),
            "mlp.c_fc": (D, F),
            "mlp.c_proj": (F, D),
        }.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[-1:]}
    return shapes | {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}


class BlockCache(NamedTuple):
    norm1: Any
    qkv: Any
    attention: Any
    projection: Any
    norm2: Any
    feed1: Any
    gelu: Any
    feed2: Any


def block(x, w, lam, variant, heads, eps, valid=None):
    """One pre-LayerNorm block: x (B, L, D) -> y (B, L, D), its attention (B, H, L, L), cache."""
    B, L, D = x.shape
    h, norm1_cache = ops.layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)
    qkv, qkv_cache = ops.linear(h, w["attn.c_attn.weight"].T, w["attn.c_attn.bias"])  # [B, L, 3D]
    mixed, A, attention_cache = attention(
        qkv.reshape(B, L, 3, heads, D // heads), lam, variant, valid=valid, causal=True
    )
    x1, projection_cache = ops.linear(mixed.reshape(B, L, D), w["attn.c_proj.weight"].T, w["attn.c_proj.bias"])
    x1 += x
    h, norm2_cache = ops.layer_norm(x1, w["ln_2.weight"], w["ln_2.bias"], eps)
    wide, feed1_cache = ops.linear(h, w["mlp.c_fc.weight"].T, w["mlp.c_fc.bias"])  # [B, L, F]
    wide, gelu_cache = ops.gelu_tanh(wide)
    y, feed2_cache = ops.linear(wide, w["mlp.c_proj.weight"].T, w["mlp.c_proj.bias"])  # [B, L, D]
    y += x1
    caches = (norm1_cache, qkv_cache, attention_cache, projection_cache, norm2_cache, feed1_cache, gelu_cache)
    return y, A, BlockCache(*caches, feed2_cache)


def block_backward(dy, cache, g):
    """dy (B, L, D) -> dx (B, L, D) and dlam; parameter gradients are written into g."""
    B, L, D = dy.shape
    # y = x1 + W2 gelu(W1 LayerNorm(x1))
    dwide, dW, g["mlp.c_proj.bias"][...] = ops.linear_backward(dy, cache.feed2)
    g["mlp.c_proj.weight"][...] = dW.T
    dh, dW, g["mlp.c_fc.bias"][...] = ops.linear_backward(ops.gelu_tanh_backward(dwide, cache.gelu), cache.feed1)
    g["mlp.c_fc.weight"][...] = dW.T
    dx1, g["ln_2.weight"][...], g["ln_2.bias"][...] = ops.layer_norm_backward(dh, cache.norm2)
    dx1 += dy  # x1 goes into the feed-forward part and past it
    # x1 = x + Wo attention(Wqkv LayerNorm(x))
    dmixed, dW, g["attn.c_proj.bias"][...] = ops.linear_backward(dx1, cache.projection)
    g["attn.c_proj.weight"][...] = dW.T
    heads = cache.attention.q.shape[1]
    dqkv, dlam = attention_backward(dmixed.reshape(B, L, heads, D // heads), cache.attention)
    dh, dW, g["attn.c_attn.bias"][...] = ops.linear_backward(dqkv.reshape(B, L, 3 * D), cache.qkv)
    g["attn.c_attn.weight"][...] = dW.T
    dx, g["ln_1.weight"][...], g["ln_1.bias"][...] = ops.layer_norm_backward(dh, cache.norm1)
    dx += dx1  # x goes into the attention and past it
    return dx, dlam


def decode(ids, w, config, valid=None):
    """ids (B, L) -> hidden (B, L, D), the attention of every layer [(B, H, L, L)], caches. w: Parameters."""
    eps = config.layer_norm_eps
    words, words_cache = ops.embedding(ids, w["transformer.wte.weight"])
    x = words + w["transformer.wpe.weight"][: ids.shape[1]]
    maps, caches = [], []
    for n, (variant, lam) in enumerate(zip(config.variants, config.lams, strict=True)):
        x, A, cache = block(x, w.under(f"transformer.h.{n}."), lam, variant, config.num_attention_heads, eps, valid)
        maps.append(A)
        caches.append(cache)
    hidden, norm_cache = ops.layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], eps)
    return hidden, maps, (words_cache, caches, norm_cache)


def decode_backward(dhidden, cache, g):
    """Gradients of every parameter below the head, written into g (Parameters), from dhidden (B, L, D)."""
    words_cache, caches, norm_cache = cache
    dx, g["transformer.ln_f.weight"][...], g["transformer.ln_f.bias"][...] = ops.layer_norm_backward(
        dhidden, norm_cache
    )
    for n in reversed(range(len(caches))):
        dx, _ = block_backward(dx, caches[n], g.under(f"transformer.h.{n}."))
    # x = words + positions
    g["transformer.wte.weight"][...] = ops.embedding_backward(dx, words_cache)
    g["transformer.wpe.weight"][: dx.shape[1]] = dx.sum(axis=0)


def causal_lm_loss(ids, labels, w, config, valid=None):
    """Mean cross-entropy in nats of every next token, and the gradient of every parameter.

    labels (B, L): the token at each position, usually the ids; position l predicts label l + 1, -100 is ignored. Only
    positions with such a label go through the head. Returns loss, Parameters.
    """
    xp = array_namespace(ids)
    hidden, _, cache = decode(ids, w, config, valid)
    follows = xp.full(labels.shape, -100, labels.dtype)
    follows[:, :-1] = labels[:, 1:]
    follows = follows.reshape(-1)
    at = xp.nonzero(follows != -100)[0]
    rows = hidden.reshape(-1, hidden.shape[-1])[at]
    table = w["transformer.wte.weight"]
    logits = rows @ table.T  # [N, D] @ [D, V] -> [N, V]
    loss, loss_cache = ops.cross_entropy(logits, follows[at])

    g = w.like(xp.zeros_like(w.flat))
    dlogits = ops.cross_entropy_backward(1.0, loss_cache)
    dhidden = xp.zeros_like(hidden)
    dhidden.reshape(-1, hidden.shape[-1])[at] = dlogits @ table
    decode_backward(dhidden, cache, g)
    g["transformer.wte.weight"][...] += dlogits.T @ rows  # tied: the table is read at both ends
    return loss, g
