"""Operations there and back, on the arrays of any library: what tests/gpu and tests/emulator compare with NumPy."""

from minisaobp.nn import ops, regularisers
from minisaobp.training.adamw import AdamW


def linear(x, W, b, dy):
    y, cache = ops.linear(x, W, b)
    return y, *ops.linear_backward(dy, cache)


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


def tanh(x, dy):
    y, cache = ops.tanh(x)
    return y, ops.tanh_backward(dy, cache)


def softmax(s, dP):
    P, cache = ops.softmax(s)
    return P, ops.softmax_backward(dP, cache)


class Drawn:
    """In place of a generator: what it would draw, which is not the same in every library."""

    def __init__(self, draws):
        self.draws = draws

    def random(self, shape, dtype):
        return self.draws.reshape(shape).astype(dtype)


def dropout(x, draws, dy):
    y, cache = ops.dropout(x, 0.3, Drawn(draws))
    return y, ops.dropout_backward(dy, cache)


def cross_entropy(logits, labels):
    loss, cache = ops.cross_entropy(logits, labels)
    return loss, ops.cross_entropy_backward(0.7, cache)


def squared_error(scores, labels):
    loss, cache = ops.squared_error(scores, labels)
    return loss, ops.squared_error_backward(0.7, cache)


def entropy_penalty(A, theta, valid):
    loss, cache = regularisers.entropy_penalty(A, theta, valid)
    return loss, *regularisers.entropy_penalty_backward(0.7, cache)


def eigen_penalty(Wq, Wk):
    loss, cache = regularisers.eigen_penalty(Wq, Wk)
    return loss, *regularisers.eigen_penalty_backward(0.7, cache)


def embedding(ids, table, dy):
    y, cache = ops.embedding(ids, table)
    return y, ops.embedding_backward(dy, cache)


def adamw(weights, gradient):
    weights, optimiser = weights.copy(), AdamW(weights * 0, abs(weights) * 0, decayed=700)
    for _ in range(3):
        optimiser.update(weights, gradient, 0.01)
    return weights, optimiser.mean, optimiser.square
