"""A BERT-style encoder, forward and backward: embeddings and post-LayerNorm blocks. What reads it is in `heads.py`.

Axis letters: B batch, L tokens, D model width, H heads, E head width, F feed-forward width, V vocabulary.
`w` holds parameters and `g` their gradients, by Hugging Face's names below the part they belong to.
"""

from typing import Any, NamedTuple

from . import ops
from .attention import attention, attention_backward, own_of_layer, own_of_layer_backward, project, project_backward

QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
OWN = "bert.encoder.layer.{}.attention.self."  # before the names of Config.own_shapes


def parameter_shapes(config):
    """{name: shape} of every parameter, in the order in which the forward pass meets them."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    shapes = {
        "bert.embeddings.word_embeddings.weight": (V, D),
        "bert.embeddings.position_embeddings.weight": (config.max_position_embeddings, D),
        "bert.embeddings.token_type_embeddings.weight": (config.type_vocab_size, D),
        **_layer_norm_shapes("bert.embeddings.LayerNorm", D),
    }
    for n in range(config.num_hidden_layers):
        layer = f"bert.encoder.layer.{n}."
        # weights, then biases: the three of each lie side by side and are used as one
        names = _projections(config, n)
        shapes |= {name + ".weight": (D, D) for name in names} | {name + ".bias": (D,) for name in names}
        shapes |= _linear_shapes(layer + "attention.output.dense", D, D)
        shapes |= _layer_norm_shapes(layer + "attention.output.LayerNorm", D)
        shapes |= _linear_shapes(layer + "intermediate.dense", D, F)
        shapes |= _linear_shapes(layer + "output.dense", F, D)
        shapes |= _layer_norm_shapes(layer + "output.LayerNorm", D)
        shapes |= {OWN.format(n) + name: shape for name, shape in config.own_shapes(n).items()}
    return shapes


def _projections(config, n):
    """Names of the linear maps of layer n's attention."""
    return [f"bert.encoder.layer.{n}.{name}" for name in QKV[-config.projections[n] :]]


def _linear_shapes(name, I, O):
    return {name + ".weight": (O, I), name + ".bias": (O,)}


def _layer_norm_shapes(name, D):
    return {name + ".weight": (D,), name + ".bias": (D,)}


def query_and_key(w, config, n):
    """Views of the query and key maps of layer n, each (H, E, D)."""
    H, D = config.num_attention_heads, config.hidden_size
    return w.stacked([name + ".weight" for name in _projections(config, n)[:2]]).reshape(2, H, D // H, D)


# ---- embeddings -----------------------------------------------------------------------------------------------------


def embed(ids, types, w, eps, rate=0.0, rng=None):
    """ids (B, L), types (B, L) or None for all 0 -> (B, L, D): LayerNorm(word + position + token type), dropped out."""
    x, words_cache = ops.embedding(ids, w["word_embeddings.weight"])
    x += w["position_embeddings.weight"][: ids.shape[1]]
    types_cache = None
    if types is None:
        x += w["token_type_embeddings.weight"][0]
    else:
        embedded, types_cache = ops.embedding(types, w["token_type_embeddings.weight"])
        x += embedded
    y, norm_cache = ops.layer_norm(x, w["LayerNorm.weight"], w["LayerNorm.bias"], eps)
    y, dropout_cache = ops.dropout(y, rate, rng)
    return y, (words_cache, types_cache, norm_cache, dropout_cache)


def embed_backward(dy, cache, g, pad=None):
    """Gradients of the three tables and the LayerNorm into g: added for the words, but none for the word `pad`."""
    words_cache, types_cache, norm_cache, dropout_cache = cache
    dy = ops.dropout_backward(dy, dropout_cache)
    dx, g["LayerNorm.weight"][...], g["LayerNorm.bias"][...] = ops.layer_norm_backward(dy, norm_cache)
    # x = words + positions + types
    dwords = ops.embedding_backward(dx, words_cache)
    if pad is not None:
        dwords[pad] = 0
    g["word_embeddings.weight"][...] += dwords  # a tied decoder has written to it
    dpositions = dx.sum(axis=0)
    g["position_embeddings.weight"][: len(dpositions)] = dpositions
    if types_cache is None:
        g["token_type_embeddings.weight"][0] = dpositions.sum(axis=0)
    else:
        g["token_type_embeddings.weight"][...] = ops.embedding_backward(dx, types_cache)


# ---- one block ------------------------------------------------------------------------------------------------------


class BlockCache(NamedTuple):
    qkv: Any
    attention: Any
    projection: Any
    dropout1: Any
    norm1: Any
    feed1: Any
    feed2: Any
    dropout2: Any
    norm2: Any


def block(x, e, w, qkv_weight, qkv_bias, own, variant, config, valid=None, rng=None):
    """One post-LayerNorm block: x (B, L, D) -> y (B, L, D), its attention (B, H, L, L), cache.

    e: (B, L, D) the embeddings, for a layer that makes its queries and keys from them, else None. qkv_weight (3, D, D)
    and qkv_bias (3, D) are the query, key and value maps side by side, or (1, ..) the value map. own: see `attention`.
    """
    B, L, D = x.shape
    heads, eps, rate = config.num_attention_heads, config.layer_norm_eps, config.hidden_dropout_prob
    qkv, qkv_cache = project(x, e, qkv_weight.reshape(-1, D), qkv_bias.reshape(-1))  # [B, L, 3D]
    mixed, A, attention_cache = attention(
        qkv.reshape(B, L, -1, heads, D // heads), own, variant, valid, False, config.attention_probs_dropout_prob, rng
    )
    projected, projection_cache = ops.linear(
        mixed.reshape(B, L, D), w["attention.output.dense.weight"], w["attention.output.dense.bias"]
    )
    projected, dropout1_cache = ops.dropout(projected, rate, rng)
    projected += x
    h, norm1_cache = ops.layer_norm(
        projected, w["attention.output.LayerNorm.weight"], w["attention.output.LayerNorm.bias"], eps
    )
    wide, feed1_cache = ops.linear_gelu(h, w["intermediate.dense.weight"], w["intermediate.dense.bias"])  # [B, L, F]
    fed, feed2_cache = ops.linear(wide, w["output.dense.weight"], w["output.dense.bias"])  # [B, L, D]
    fed, dropout2_cache = ops.dropout(fed, rate, rng)
    fed += h
    y, norm2_cache = ops.layer_norm(fed, w["output.LayerNorm.weight"], w["output.LayerNorm.bias"], eps)
    cache = BlockCache(
        qkv_cache,
        attention_cache,
        projection_cache,
        dropout1_cache,
        norm1_cache,
        feed1_cache,
        feed2_cache,
        dropout2_cache,
        norm2_cache,
    )
    return y, A, cache


def block_backward(dy, cache, g, dqkv_weight, dqkv_bias, dA=None):
    """dy (B, L, D) -> dx (B, L, D), de in its shape or None, and the gradient of what the attention has of its own;
    gradients of parameters are written into g, dqkv_weight and dqkv_bias. dA: what a penalty sends to the attention."""
    B, L, D = dy.shape
    # y = LayerNorm(h + fed)
    dfed, g["output.LayerNorm.weight"][...], g["output.LayerNorm.bias"][...] = ops.layer_norm_backward(dy, cache.norm2)
    # fed = W2 gelu(W1 h)
    dwide, g["output.dense.weight"][...], g["output.dense.bias"][...] = ops.linear_backward(
        ops.dropout_backward(dfed, cache.dropout2), cache.feed2
    )
    dh, g["intermediate.dense.weight"][...], g["intermediate.dense.bias"][...] = ops.linear_gelu_backward(
        dwide, cache.feed1
    )
    dh += dfed  # h goes into W1 and past it
    # h = LayerNorm(x + projected)
    dprojected, g["attention.output.LayerNorm.weight"][...], g["attention.output.LayerNorm.bias"][...] = (
        ops.layer_norm_backward(dh, cache.norm1)
    )
    # projected = Wo attention(Wqkv x)
    dmixed, g["attention.output.dense.weight"][...], g["attention.output.dense.bias"][...] = ops.linear_backward(
        ops.dropout_backward(dprojected, cache.dropout1), cache.projection
    )
    heads = cache.attention.v.shape[1]
    dqkv, down = attention_backward(dmixed.reshape(B, L, heads, D // heads), cache.attention, dA)
    dx, de, dW, db = project_backward(dqkv.reshape(B, L, -1), cache.qkv)
    dqkv_weight[...], dqkv_bias[...] = dW.reshape(-1, D, D), db.reshape(-1, D)
    dx += dprojected  # x goes into the attention and past it
    return dx, de, down


# ---- the whole encoder ----------------------------------------------------------------------------------------------


def encode(ids, types, w, config, valid=None, rng=None):
    """ids (B, L), types (B, L) or None -> hidden (B, L, D), the attention of every layer [(B, H, L, L)], cache.

    w: Parameters. rng: draws the dropout of training; None for none.
    """
    eps, rate = config.layer_norm_eps, config.hidden_dropout_prob
    x, embed_cache = embed(ids, types, w.under("bert.embeddings."), eps, rate, rng)
    e, maps, caches = x, [], []
    for n, variant in enumerate(config.variants):
        layer = f"bert.encoder.layer.{n}."
        qkv = [w.stacked([name + kind for name in _projections(config, n)]) for kind in (".weight", ".bias")]
        own = own_of_layer(w.under(OWN.format(n)), config.lams[n])
        source = e if variant == "static" else None
        x, A, cache = block(x, source, w.under(layer), *qkv, own, variant, config, valid, rng)
        maps.append(A)
        caches.append(cache)
    return x, maps, (embed_cache, caches)


def encode_backward(dx, cache, w, g, config, dmaps):
    """Gradients of every encoder parameter from dx (B, L, D), written into g, to the word embeddings added.

    dmaps: for every layer what a penalty sends to its attention, (B, H, L, L) or None.
    """
    embed_cache, caches = cache
    from_queries = []  # what static layers send to the embeddings
    for n in reversed(range(len(caches))):
        layer = f"bert.encoder.layer.{n}."
        dqkv = [g.stacked([name + kind for name in _projections(config, n)]) for kind in (".weight", ".bias")]
        dx, de, down = block_backward(dx, caches[n], g.under(layer), *dqkv, dmaps[n])
        from_queries += [] if de is None else [de]
        own_of_layer_backward(down, w.under(OWN.format(n)), g.under(OWN.format(n)))
    for de in from_queries:
        dx += de
    embed_backward(dx, embed_cache, g.under("bert.embeddings."), config.pad_token_id)
