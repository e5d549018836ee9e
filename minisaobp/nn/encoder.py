"""A BERT-style encoder, forward and backward: embeddings, post-LayerNorm blocks, masked-language-model head.

Axis letters: B batch, L tokens, D model width, H heads, E head width, F feed-forward width, V vocabulary, N labelled
tokens. `w` holds parameters and `g` their gradients, by Hugging Face's names below the part they belong to.
"""

from typing import Any, NamedTuple

from ..backend import array_namespace
from . import ops
from .attention import attention, attention_backward

QKV = ("attention.self.query", "attention.self.key", "attention.self.value")


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
        shapes |= {layer + name + ".weight": (D, D) for name in QKV} | {layer + name + ".bias": (D,) for name in QKV}
        shapes |= _linear_shapes(layer + "attention.output.dense", D, D)
        shapes |= _layer_norm_shapes(layer + "attention.output.LayerNorm", D)
        shapes |= _linear_shapes(layer + "intermediate.dense", D, F)
        shapes |= _linear_shapes(layer + "output.dense", F, D)
        shapes |= _layer_norm_shapes(layer + "output.LayerNorm", D)
    shapes |= _linear_shapes("cls.predictions.transform.dense", D, D)
    shapes |= _layer_norm_shapes("cls.predictions.transform.LayerNorm", D)
    return shapes | {"cls.predictions.bias": (V,)}


def _linear_shapes(name, I, O):
    return {name + ".weight": (O, I), name + ".bias": (O,)}


def _layer_norm_shapes(name, D):
    return {name + ".weight": (D,), name + ".bias": (D,)}


# ---- embeddings -----------------------------------------------------------------------------------------------------


def embed(ids, w, eps):
    """ids (B, L) -> (B, L, D): LayerNorm(word + position + token type 0)."""
    words, words_cache = ops.embedding(ids, w["word_embeddings.weight"])
    x = words + w["position_embeddings.weight"][: ids.shape[1]] + w["token_type_embeddings.weight"][0]
    y, norm_cache = ops.layer_norm(x, w["LayerNorm.weight"], w["LayerNorm.bias"], eps)
    return y, (words_cache, norm_cache)


def embed_backward(dy, cache, g, pad=None):
    """Gradients of the three tables and the LayerNorm, written into g; none for the word `pad`."""
    words_cache, norm_cache = cache
    dx, g["LayerNorm.weight"][...], g["LayerNorm.bias"][...] = ops.layer_norm_backward(dy, norm_cache)
    # x = words + positions + types
    g["word_embeddings.weight"][...] = ops.embedding_backward(dx, words_cache)
    if pad is not None:
        g["word_embeddings.weight"][pad] = 0
    dpositions = dx.sum(axis=0)
    g["position_embeddings.weight"][: len(dpositions)] = dpositions
    g["token_type_embeddings.weight"][0] = dpositions.sum(axis=0)


# ---- one block ------------------------------------------------------------------------------------------------------


class BlockCache(NamedTuple):
    qkv: Any
    attention: Any
    projection: Any
    norm1: Any
    feed1: Any
    gelu: Any
    feed2: Any
    norm2: Any


def block(x, w, qkv_weight, qkv_bias, lam, variant, heads, eps, valid=None):
    """One post-LayerNorm block: x (B, L, D) -> y (B, L, D), its attention (B, H, L, L), cache.

    qkv_weight (3, D, D) and qkv_bias (3, D) are the query, key and value maps side by side.
    """
    B, L, D = x.shape
    qkv, qkv_cache = ops.linear(x, qkv_weight.reshape(3 * D, D), qkv_bias.reshape(3 * D))  # [B, L, 3D]
    mixed, A, attention_cache = attention(qkv.reshape(B, L, 3, heads, D // heads), lam, variant, valid)
    projected, projection_cache = ops.linear(
        mixed.reshape(B, L, D), w["attention.output.dense.weight"], w["attention.output.dense.bias"]
    )
    projected += x
    h, norm1_cache = ops.layer_norm(
        projected, w["attention.output.LayerNorm.weight"], w["attention.output.LayerNorm.bias"], eps
    )
    wide, feed1_cache = ops.linear(h, w["intermediate.dense.weight"], w["intermediate.dense.bias"])  # [B, L, F]
    wide, gelu_cache = ops.gelu(wide)
    fed, feed2_cache = ops.linear(wide, w["output.dense.weight"], w["output.dense.bias"])  # [B, L, D]
    fed += h
    y, norm2_cache = ops.layer_norm(fed, w["output.LayerNorm.weight"], w["output.LayerNorm.bias"], eps)
    return (
        y,
        A,
        BlockCache(
            qkv_cache,
            attention_cache,
            projection_cache,
            norm1_cache,
            feed1_cache,
            gelu_cache,
            feed2_cache,
            norm2_cache,
        ),
    )


def block_backward(dy, cache, g, dqkv_weight, dqkv_bias):
    """dy (B, L, D) -> dx (B, L, D) and dlam; parameter gradients are written into g, dqkv_weight and dqkv_bias."""
    B, L, D = dy.shape
    # y = LayerNorm(h + fed)
    dfed, g["output.LayerNorm.weight"][...], g["output.LayerNorm.bias"][...] = ops.layer_norm_backward(dy, cache.norm2)
    # fed = W2 gelu(W1 h)
    dwide, g["output.dense.weight"][...], g["output.dense.bias"][...] = ops.linear_backward(dfed, cache.feed2)
    dwide = ops.gelu_backward(dwide, cache.gelu)
    dh, g["intermediate.dense.weight"][...], g["intermediate.dense.bias"][...] = ops.linear_backward(dwide, cache.feed1)
    dh += dfed  # h goes into W1 and past it
    # h = LayerNorm(x + projected)
    dprojected, g["attention.output.LayerNorm.weight"][...], g["attention.output.LayerNorm.bias"][...] = (
        ops.layer_norm_backward(dh, cache.norm1)
    )
    # projected = Wo attention(Wqkv x)
    dmixed, g["attention.output.dense.weight"][...], g["attention.output.dense.bias"][...] = ops.linear_backward(
        dprojected, cache.projection
    )
    heads = cache.attention.q.shape[1]
    dqkv, dlam = attention_backward(dmixed.reshape(B, L, heads, D // heads), cache.attention)
    dx, dW, db = ops.linear_backward(dqkv.reshape(B, L, 3 * D), cache.qkv)
    dqkv_weight[...], dqkv_bias[...] = dW.reshape(3, D, D), db.reshape(3, D)
    dx += dprojected  # x goes into the attention and past it
    return dx, dlam


# ---- masked-language-model head -------------------------------------------------------------------------------------


def masked_lm_head(h, w, table, eps):
    """Token scores: h (N, D) -> (N, V) = LayerNorm(gelu(W h + b)) table^T + bias; the table is the word embedding."""
    t, dense_cache = ops.linear(h, w["transform.dense.weight"], w["transform.dense.bias"])
    t, gelu_cache = ops.gelu(t)
    t, norm_cache = ops.layer_norm(t, w["transform.LayerNorm.weight"], w["transform.LayerNorm.bias"], eps)
    logits, decoder_cache = ops.linear(t, table, w["bias"])  # [N, D] @ [D, V] -> [N, V]
    return logits, (dense_cache, gelu_cache, norm_cache, decoder_cache)


def masked_lm_head_backward(dlogits, cache, g):
    """dh (N, D) and dtable (V, D), to be added to what the embedding gives the same table."""
    dense_cache, gelu_cache, norm_cache, decoder_cache = cache
    dt, dtable, g["bias"][...] = ops.linear_backward(dlogits, decoder_cache)
    dt, g["transform.LayerNorm.weight"][...], g["transform.LayerNorm.bias"][...] = ops.layer_norm_backward(
        dt, norm_cache
    )
    dt = ops.gelu_backward(dt, gelu_cache)
    dh, g["transform.dense.weight"][...], g["transform.dense.bias"][...] = ops.linear_backward(dt, dense_cache)
    return dh, dtable


# ---- the model ------------------------------------------------------------------------------------------------------


def encode(ids, w, config, valid=None):
    """ids (B, L) -> hidden (B, L, D), the attention of every layer [(B, H, L, L)], caches. w: Parameters."""
    eps = config.layer_norm_eps
    x, embed_cache = embed(ids, w.under("bert.embeddings."), eps)
    caches, maps = [embed_cache], []
    for n, (variant, lam) in enumerate(zip(config.variants, config.lams, strict=True)):
        layer = f"bert.encoder.layer.{n}."
        qkv = [w.stacked([layer + name + kind for name in QKV]) for kind in (".weight", ".bias")]
        x, A, cache = block(x, w.under(layer), *qkv, lam, variant, config.num_attention_heads, eps, valid)
        caches.append(cache)
        maps.append(A)
    return x, maps, caches


def encode_backward(dx, caches, g, config):
    """Gradients of every encoder parameter, written into g (Parameters), from dx (B, L, D)."""
    for n in reversed(range(len(caches) - 1)):
        layer = f"bert.encoder.layer.{n}."
        dqkv = [g.stacked([layer + name + kind for name in QKV]) for kind in (".weight", ".bias")]
        dx, _ = block_backward(dx, caches[n + 1], g.under(layer), *dqkv)
    embed_backward(dx, caches[0], g.under("bert.embeddings."), config.pad_token_id)


def masked_lm_loss(ids, labels, w, config, valid=None):
    """Mean cross-entropy in nats where labels (B, L) are not -100, and the gradient of every parameter.

    Only labelled tokens go through the head. Returns loss, Parameters.
    """
    xp = array_namespace(ids)
    hidden, _, caches = encode(ids, w, config, valid)
    at = xp.nonzero(labels.reshape(-1) != -100)[0]
    rows = hidden.reshape(-1, hidden.shape[-1])[at]
    table = w["bert.embeddings.word_embeddings.weight"]
    logits, head_cache = masked_lm_head(rows, w.under("cls.predictions."), table, config.layer_norm_eps)
    loss, loss_cache = ops.cross_entropy(logits, labels.reshape(-1)[at])

    g = w.like(xp.zeros_like(w.flat))
    dlogits = ops.cross_entropy_backward(1.0, loss_cache)
    drows, dtable = masked_lm_head_backward(dlogits, head_cache, g.under("cls.predictions."))
    dhidden = xp.zeros_like(hidden)
    dhidden.reshape(-1, hidden.shape[-1])[at] = drows
    encode_backward(dhidden, caches, g, config)
    g["bert.embeddings.word_embeddings.weight"][...] += dtable  # tied: the table is read at both ends
    return loss, g
