"""A GPT-2-style decoder, forward and backward: embeddings and pre-LayerNorm causal blocks. Its head is in `heads.py`.

Axis letters: B batch, L tokens, D model width, H heads, F feed-forward width, V vocabulary.
`w` holds parameters and `g` their gradients, by Hugging Face's names below the part they belong to. GPT-2 stores the
weight of a linear map as (inputs, outputs), the transpose of `ops.linear`'s.
"""

import functools
from typing import Any, NamedTuple

from . import ops
from .attention import attention, attention_backward, own_of_layer, own_of_layer_backward, project, project_backward

OWN = "transformer.h.{}.attn."  # before the names of Config.own_shapes


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order in which the forward pass meets them."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (config.max_position_embeddings, D)}
    for n in range(config.num_hidden_layers):
        layer = f"transformer.h.{n}."
        for name, shape in {
            "ln_1": (D,),
            "attn.c_attn": (D, config.projections[n] * D),
            "attn.c_proj": (D, D),
            "ln_2": (D,),
            "mlp.c_fc": (D, F),
            "mlp.c_proj": (F, D),
        }.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[-1:]}
        shapes |= {OWN.format(n) + name: shape for name, shape in config.own_shapes(n).items()}
    return shapes | {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}


def query_and_key(w, config, n):
    """Views of the query and key maps of layer n, each (H, E, D)."""
    H, D = config.num_attention_heads, config.hidden_size
    return w[f"transformer.h.{n}.attn.c_attn.weight"].T.reshape(3, H, D // H, D)[:2]


class BlockCache(NamedTuple):
    norm1: Any
    norm_e: Any  # of a layer that reads the embeddings
    qkv: Any
    attention: Any
    projection: Any
    dropout1: Any
    norm2: Any
    feed1: Any
    feed2: Any
    dropout2: Any


def block(x, e, w, config, attend, rng=None):
    """One pre-LayerNorm block: x (B, L, D) -> y (B, L, D), its attention (B, H, L, L), cache.

    e: (B, L, D) the embeddings, for a layer that makes its queries and keys from them, under the LayerNorm that x has
    too; else None. attend: `attention` with everything but qkv (B, L, 3, H, E) given, or what stands for it in
    generation.
    """
    B, L, D = x.shape
    heads, eps, rate = config.num_attention_heads, config.layer_norm_eps, config.hidden_dropout_prob
    h, norm1_cache = ops.layer_norm(x, w["ln_1.weight"], w["ln_1.bias"], eps)
    norm_e_cache = None
    if e is not None:
        e, norm_e_cache = ops.layer_norm(e, w["ln_1.weight"], w["ln_1.bias"], eps)
    qkv, qkv_cache = project(h, e, w["attn.c_attn.weight"].T, w["attn.c_attn.bias"])  # [B, L, 3D]
    mixed, A, attention_cache = attend(qkv.reshape(B, L, -1, heads, D // heads))
    x1, projection_cache = ops.linear(mixed.reshape(B, L, D), w["attn.c_proj.weight"].T, w["attn.c_proj.bias"])
    x1, dropout1_cache = ops.dropout(x1, rate, rng)
    x1 += x
    h, norm2_cache = ops.layer_norm(x1, w["ln_2.weight"], w["ln_2.bias"], eps)
    wide, feed1_cache = ops.linear_gelu(h, w["mlp.c_fc.weight"].T, w["mlp.c_fc.bias"], tanh=True)  # [B, L, F]
    y, feed2_cache = ops.linear(wide, w["mlp.c_proj.weight"].T, w["mlp.c_proj.bias"])  # [B, L, D]
    y, dropout2_cache = ops.dropout(y, rate, rng)
    y += x1
    cache = BlockCache(
        norm1_cache,
        norm_e_cache,
        qkv_cache,
        attention_cache,
        projection_cache,
        dropout1_cache,
        norm2_cache,
        feed1_cache,
        feed2_cache,
        dropout2_cache,
    )
    return y, A, cache


def block_backward(dy, cache, g, dA=None):
    """dy (B, L, D) -> dx (B, L, D), de in its shape or None, and the gradient of what the attention has of its own;
    gradients of parameters are written into g. dA: what a penalty sends to the attention."""
    B, L, D = dy.shape
    # y = x1 + W2 gelu(W1 LayerNorm(x1))
    dfed = ops.dropout_backward(dy, cache.dropout2)
    dwide, dW, g["mlp.c_proj.bias"][...] = ops.linear_backward(dfed, cache.feed2)
    g["mlp.c_proj.weight"][...] = dW.T
    dh, dW, g["mlp.c_fc.bias"][...] = ops.linear_gelu_backward(dwide, cache.feed1)
    g["mlp.c_fc.weight"][...] = dW.T
    dx1, g["ln_2.weight"][...], g["ln_2.bias"][...] = ops.layer_norm_backward(dh, cache.norm2)
    dx1 += dy  # x1 goes into the feed-forward part and past it
    # x1 = x + Wo attention(Wqkv LayerNorm(x))
    dprojected = ops.dropout_backward(dx1, cache.dropout1)
    dmixed, dW, g["attn.c_proj.bias"][...] = ops.linear_backward(dprojected, cache.projection)
    g["attn.c_proj.weight"][...] = dW.T
    heads = cache.attention.v.shape[1]
    dqkv, down = attention_backward(dmixed.reshape(B, L, heads, D // heads), cache.attention, dA)
    dh, de, dW, g["attn.c_attn.bias"][...] = project_backward(dqkv.reshape(B, L, -1), cache.qkv)
    g["attn.c_attn.weight"][...] = dW.T
    dx, g["ln_1.weight"][...], g["ln_1.bias"][...] = ops.layer_norm_backward(dh, cache.norm1)
    dx += dx1  # x goes into the attention and past it
    if de is not None:
        de, dgamma, dbeta = ops.layer_norm_backward(de, cache.norm_e)
        g["ln_1.weight"][...] += dgamma
        g["ln_1.bias"][...] += dbeta
    return dx, de, down


def decode(ids, w, config, valid=None, rng=None):
    """ids (B, L) -> hidden (B, L, D), the attention of every layer [(B, H, L, L)], cache.

    w: Parameters. rng: draws the dropout of training; None for none.
    """
    x, words_cache = ops.embedding(ids, w["transformer.wte.weight"])
    x += w["transformer.wpe.weight"][: ids.shape[1]]
    x, dropout_cache = ops.dropout(x, config.hidden_dropout_prob, rng)
    e, maps, caches = x, [], []
    for n, variant in enumerate(config.variants):
        attend = functools.partial(
            attention,
            own=own_of_layer(w.under(OWN.format(n)), config.lams[n]),
            variant=variant,
            valid=valid,
            causal=True,
            rate=config.attention_probs_dropout_prob,
            rng=rng,
        )
        source = e if variant == "static" else None
        x, A, cache = block(x, source, w.under(f"transformer.h.{n}."), config, attend, rng)
        maps.append(A)
        caches.append(cache)
    hidden, norm_cache = final_norm(x, w, config)
    return hidden, maps, (words_cache, dropout_cache, caches, norm_cache)


def final_norm(x, w, config):
    return ops.layer_norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], config.layer_norm_eps)


def decode_backward(dhidden, cache, w, g, dmaps):
    """Gradients of every parameter below the head from dhidden (B, L, D), written into g, to the words' table added.

    dmaps: for every layer what a penalty sends to its attention, (B, H, L, L) or None.
    """
    words_cache, dropout_cache, caches, norm_cache = cache
    dx, g["transformer.ln_f.weight"][...], g["transformer.ln_f.bias"][...] = ops.layer_norm_backward(
        dhidden, norm_cache
    )
    from_queries = []  # what static layers send to the embeddings
    for n in reversed(range(len(caches))):
        dx, de, down = block_backward(dx, caches[n], g.under(f"transformer.h.{n}."), dmaps[n])
        from_queries += [] if de is None else [de]
        own_of_layer_backward(down, w.under(OWN.format(n)), g.under(OWN.format(n)))
    for de in from_queries:
        dx += de
    dx = ops.dropout_backward(dx, dropout_cache)
    # x = words + positions
    g["transformer.wte.weight"][...] += ops.embedding_backward(dx, words_cache)  # the tied head has written to it
    g["transformer.wpe.weight"][: dx.shape[1]] = dx.sum(axis=0)
