"""One table of operations, one gradient check for all of them: float64, random upstream gradient, distinct sizes."""

import numpy as np
import pytest

from minisaobp.bp.refinement import VARIANTS
from minisaobp.nn import attention as attn
from minisaobp.nn import ops, regularisers
from minisaobp.nn.config import MIXINGS
from tests.gradient_check import check_vjp

R = np.random.default_rng(0)
IDS = R.integers(0, 5, (2, 7))  # ids repeat, so their gradients must be summed
LABELS = R.integers(0, 6, 4)
NUMBERS = R.standard_normal((4, 3))
VALID = np.arange(5) < np.array([[5], [3]])
LAM = np.array([0.3, -0.6, 2.5, 1.0]).reshape(4, 1, 1)
WEIGHTS = 0.05 + R.random((2, 4, 5, 5))  # positive, as attention is, so that they can be moved a little
THETA = np.array([0.9, 0.2, 0.75, 0.5])  # heads 1 and 2 within the margin or outside it, not near its end


def pair(function, backward):
    """A forward and backward pair as the (f, vjp) that the check takes."""
    return (
        lambda *x: function(*x)[0],
        lambda dy, *x: _tuple(backward(dy, function(*x)[-1])),
    )


def _tuple(gradients):
    return gradients if isinstance(gradients, (tuple, list)) else (gradients,)


def attention_of(variant, valid, causal, rate=0.0):
    def run(qkv, own):
        return attn.attention(qkv, own, variant, valid, causal, rate, np.random.default_rng(3))

    def forward(qkv, own):
        return run(qkv, own)[0]

    def vjp(dmixed, qkv, own):
        dqkv, down = attn.attention_backward(dmixed, run(qkv, own)[2])
        return dqkv, np.zeros_like(own) if down is None else down

    return forward, vjp


def attention_shapes(variant):
    """Of qkv, and what is the layer's own."""
    return [(2, 5, 1 if variant in ("none", "uniform", "fixed") else 3, 4, 6), (4, 7, 7) if variant == "fixed" else LAM]


def measured(variant):
    """Attention on which a penalty of its own acts: what flows into it beside the values' gradient."""
    ds = np.random.default_rng(5).standard_normal((2, 4, 5, 5))

    def forward(qkv, own):
        mixed, A, _ = attn.attention(qkv, own, variant, VALID)
        return np.append(mixed.ravel(), (ds * A).sum())

    def vjp(dy, qkv, own):
        mixed, _, cache = attn.attention(qkv, own, variant, VALID)
        dqkv, down = attn.attention_backward(dy[:-1].reshape(mixed.shape), cache, dy[-1] * ds)
        return dqkv, np.zeros_like(own) if down is None else down

    return forward, vjp


OPERATIONS = (
    {
        "linear": (*pair(ops.linear, ops.linear_backward), [(2, 3, 4), (5, 4), (5,)]),
        "layer_norm": (
            *pair(lambda x, gamma, beta: ops.layer_norm(x, gamma, beta, 1e-12), ops.layer_norm_backward),
            [(2, 3, 6), (6,), (6,)],
        ),
        "gelu": (*pair(ops.gelu, ops.gelu_backward), [(3, 7)]),
        "gelu tanh": (*pair(lambda x: ops.gelu(x, tanh=True), ops.gelu_backward), [(3, 7)]),
        "linear_gelu": (*pair(ops.linear_gelu, ops.linear_gelu_backward), [(2, 3, 4), (5, 4), (5,)]),
        "linear_gelu tanh": (
            *pair(lambda *args: ops.linear_gelu(*args, tanh=True), ops.linear_gelu_backward),
            [(2, 3, 4), (5, 4), (5,)],
        ),
        "tanh": (*pair(ops.tanh, ops.tanh_backward), [(3, 7)]),
        "dropout": (
            *pair(lambda x: ops.dropout(x, 0.3, np.random.default_rng(3)), ops.dropout_backward),
            [(2, 3, 6)],
        ),
        "softmax": (*pair(ops.softmax, ops.softmax_backward), [(2, 3, 6)]),
        "embedding": (*pair(lambda table: ops.embedding(IDS, table), ops.embedding_backward), [(5, 3)]),
        "cross_entropy": (*pair(lambda x: ops.cross_entropy(x, LABELS), ops.cross_entropy_backward), [(4, 6)]),
        "squared_error": (*pair(lambda x: ops.squared_error(x, NUMBERS), ops.squared_error_backward), [(4, 3)]),
        "project": (
            *pair(
                lambda x, W, b: attn.project(x, None, W, b),
                lambda dy, cache: [d for d in attn.project_backward(dy, cache) if d is not None],
            ),
            [(2, 3, 4), (12, 4), (12,)],
        ),
        "project static": (*pair(attn.project, attn.project_backward), [(2, 3, 4), (2, 3, 4), (12, 4), (12,)]),
        "linear_weights": (*pair(attn.linear_weights, attn.linear_weights_backward), [(2, 4, 5, 6), (2, 4, 5, 6)]),
        "entropy_penalty": (
            *pair(regularisers.entropy_penalty, regularisers.entropy_penalty_backward),
            [WEIGHTS, THETA],
        ),
        "entropy_penalty padded": (
            *pair(
                lambda A, theta: regularisers.entropy_penalty(A, theta, VALID), regularisers.entropy_penalty_backward
            ),
            [WEIGHTS, THETA],
        ),
        "eigen_penalty": (
            *pair(regularisers.eigen_penalty, regularisers.eigen_penalty_backward),
            [(3, 4, 6), (3, 4, 6)],
        ),
        "attention high dropped out": (*attention_of("high", VALID, False, rate=0.3), [(2, 5, 3, 4, 6), LAM]),
    }
    | {
        f"attention {variant} under a penalty": (*measured(variant), attention_shapes(variant))
        for variant in ("original", "high", "elemmul", "fixed", "static", "linear")
    }
    | {
        f"attention {variant}{' padded' if valid is not None else ''}{' causal' if causal else ''}": (
            *attention_of(variant, valid, causal),
            attention_shapes(variant),
        )
        for variant in VARIANTS + MIXINGS
        for valid in (None, VALID)
        for causal in (False, True)
    }
)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    forward, vjp, shapes = OPERATIONS[name]
    rng = np.random.default_rng(1)
    arguments = [x if isinstance(x, np.ndarray) else rng.standard_normal(x) for x in shapes]
    check_vjp(forward, vjp, arguments, rng)


def test_every_pair_is_in_the_table():
    named = [name for module in (ops, attn, regularisers) for name in vars(module) if name.endswith("_backward")]
    # those of attention go through it
    pairs = {name.removesuffix("_backward") for name in named} - {"refined_softmax", "refine_rows", "own_of_layer"}
    assert pairs == {name.partition(" ")[0] for name in OPERATIONS}


def test_the_margin_lets_some_heads_go():
    deviation = regularisers.entropy_penalty(WEIGHTS, THETA)[1].deviation
    assert (deviation == 0).any() and (deviation != 0).any()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gelu_against_erf(scale):
    x = np.random.default_rng(2).standard_normal(20000) * scale
    from math import erf, sqrt

    wanted = np.array([v * 0.5 * (1 + erf(v / sqrt(2))) for v in x])
    # x times the error of Phi: 1e-15 in float64 (polynomial 9e-16); a few roundings of 6e-8 in float32
    np.testing.assert_allclose(ops.gelu(x)[0], wanted, rtol=1e-15, atol=2e-15)
    np.testing.assert_allclose(ops.gelu(x.astype(np.float32))[0], wanted, rtol=3e-7, atol=3e-7)


def test_gelu_across_block_borders():
    x = np.linspace(-5, 5, 2 * ops._BLOCK + 17)
    assert np.array_equal(ops.gelu(x)[0][-40:], ops.gelu(x[-40:])[0])


def test_dropout_keeps_the_mean_and_drops_the_share_asked_for():
    x = np.ones((200, 500), np.float32)
    y, cache = ops.dropout(x, 0.1, np.random.default_rng(0))
    assert y.dtype == np.float32 and set(np.unique(y)) == {0, np.float32(1 / 0.9)}
    share = (y == 0).mean()  # 100,000 draws: standard deviation 0.00095
    assert abs(share - 0.1) < 0.004 and np.array_equal(cache.kept, y != 0)
    for rate, rng in ((0.0, np.random.default_rng(0)), (0.5, None)):
        same, cache = ops.dropout(x, rate, rng)
        assert same is x and cache is None and ops.dropout_backward(y, cache) is y


def test_softmax_of_a_row_without_any_key_is_zero():
    P, cache = ops.softmax(np.array([[-np.inf, -np.inf], [0.0, 0.0]]))
    np.testing.assert_array_equal(P, [[0, 0], [0.5, 0.5]])
    assert np.isfinite(ops.softmax_backward(np.ones((2, 2)), cache)).all()


def test_two_forwards_before_a_backward():
    x, z = R.standard_normal((2, 3, 4))
    y, first = ops.layer_norm(x, np.ones(4), np.zeros(4), 1e-12)
    before = ops.layer_norm_backward(np.arange(12.0).reshape(3, 4), first)[0]
    ops.layer_norm(z, np.ones(4), np.zeros(4), 1e-12)
    assert np.array_equal(ops.layer_norm_backward(np.arange(12.0).reshape(3, 4), first)[0], before)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-15)
