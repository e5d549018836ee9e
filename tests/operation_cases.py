"""Operations there and back, on the arrays of any library: what tests/gpu and tests/emulator compare with NumPy."""

from minisaobp.nn import ops
from minisaobp.training.adamw import AdamW


def layer_norm(x, gamma, beta, dy):
    y, cache = ops.layer_norm(x, gamma, beta, 1e-12)
    return y, *ops.layer_norm_backward(dy, cache)


def gelu(x, dy):
    y, cache = ops.gelu(x)
    z, tanh_cache = ops.gelu(x, tanh=True)
    return y, ops.gelu_backward(dy, cache), z, ops.gelu_backward(dy, tanh_cache)


def linear_gelu(x, W, b, dy):
    y, cache = ops.linear_gelu(x, W, b)
    z, tanh_cache = ops.linear_gelu(x, W, b, tanh=True)
    return y, *ops.linear_gelu_backward(dy, cache), z, *ops.linear_gelu_backward(dy, tanh_cache)


def cross_entropy(logits, labels):
    loss, cache = ops.cross_entropy(logits, labels)
    return loss, ops.cross_entropy_backward(0.7, cache)


def embedding(ids, table, dy):
    y, cache = ops.embedding(ids, table)
    return y, ops.embedding_backward(dy, cache)


def adamw(weights, gradient):
    weights, optimiser = weights.copy(), AdamW(weights * 0, abs(weights) * 0, decayed=700)
    for _ in range(3):
        optimiser.update(weights, gradient, 0.01)
    return weights, optimiser.mean, optimiser.square
