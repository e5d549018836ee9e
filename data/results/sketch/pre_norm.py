"""LayerNorm before each sublayer instead of after it, for this study alone: h = x + attention(LN(x)) and
y = h + feed_forward(LN(h)).

All else is as in the package's encoder, the LayerNorm of the embeddings and that of the head too; after the last block
there is no other. Axis letters as in `minisaobp/nn/encoder.py`.
"""

import contextlib
from unittest import mock

from minisaobp.nn import encoder, ops
from minisaobp.nn.attention import attention, attention_backward, project, project_backward


def block(x, e, w, qkv_weight, qkv_bias, own, variant, config, valid=None, rng=None):
    """x (B, L, D) -> y (B, L, D), its attention (B, H, L, L), cache."""
    B, L, D = x.shape
    heads, eps, rate = config.num_attention_heads, config.layer_norm_eps, config.hidden_dropout_prob
    norms = [[w[f"{name}.LayerNorm.{kind}"] for kind in ("weight", "bias")] for name in ("attention.output", "output")]
    normed, norm1 = ops.layer_norm(x, *norms[0], eps)
    qkv, qkv_cache = project(normed, e, qkv_weight.reshape(-1, D), qkv_bias.reshape(-1))
    qkv = qkv.reshape(B, L, -1, heads, D // heads)
    mixed, A, mixing = attention(qkv, own, variant, valid, False, config.attention_probs_dropout_prob, rng)
    dense = w["attention.output.dense.weight"], w["attention.output.dense.bias"]
    projected, projection = ops.linear(mixed.reshape(B, L, D), *dense)
    projected, dropout1 = ops.dropout(projected, rate, rng)
    h = x + projected
    normed, norm2 = ops.layer_norm(h, *norms[1], eps)
    wide, feed1 = ops.linear_gelu(normed, w["intermediate.dense.weight"], w["intermediate.dense.bias"])
    fed, feed2 = ops.linear(wide, w["output.dense.weight"], w["output.dense.bias"])
    fed, dropout2 = ops.dropout(fed, rate, rng)
    cache = (qkv_cache, mixing, projection, dropout1, norm1, feed1, feed2, dropout2, norm2)
    return h + fed, A, encoder.BlockCache(*cache)


def block_backward(dy, cache, g, dqkv_weight, dqkv_bias, dA=None):
    """dy (B, L, D) -> dx, de and the gradient of what the attention has of its own; the others into g and dqkv."""
    B, L, D = dy.shape

    def linear(dout, name, one, backward=ops.linear_backward):
        dinner, g[f"{name}.weight"][...], g[f"{name}.bias"][...] = backward(dout, one)
        return dinner

    # y = h + W2 gelu(W1 LN(h))
    dwide = linear(ops.dropout_backward(dy, cache.dropout2), "output.dense", cache.feed2)
    dnormed = linear(dwide, "intermediate.dense", cache.feed1, ops.linear_gelu_backward)
    dh = dy + linear(dnormed, "output.LayerNorm", cache.norm2, ops.layer_norm_backward)
    # h = x + Wo attention(Wqkv LN(x))
    dmixed = linear(ops.dropout_backward(dh, cache.dropout1), "attention.output.dense", cache.projection)
    heads = cache.attention.v.shape[1]
    dqkv, down = attention_backward(dmixed.reshape(B, L, heads, D // heads), cache.attention, dA)
    dnormed, de, dW, db = project_backward(dqkv.reshape(B, L, -1), cache.qkv)
    dqkv_weight[...], dqkv_bias[...] = dW.reshape(-1, D, D), db.reshape(-1, D)
    return dh + linear(dnormed, "attention.output.LayerNorm", cache.norm1, ops.layer_norm_backward), de, down


@contextlib.contextmanager
def patched():
    with mock.patch.multiple(encoder, block=block, block_backward=block_backward):
        yield
