import math
import tracemalloc

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.bp import streaming
from minisaobp.bp.streaming import streaming_attention, streaming_attention_backward
from tests.gradient_check import check_vjp

EXACT = 1e-12  # float64, L <= 12, values of order 1: a few dozen roundings of 1e-16 in either form
SINGLE = 5e-6  # float32, scores below 10 and a hundred messages, each rounded at 6e-8
LAM = np.array([0.2, -0.5, 2.5]).reshape(3, 1, 1)
VALID = np.array([[True] * 10, [True, True, False, True, True, True, True, False, False, False]])[:, None]

cases = [
    pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"]),
    pytest.mark.parametrize("causal", [False, True]),
    pytest.mark.parametrize("include_self", [False, True]),
    pytest.mark.parametrize("valid", [None, VALID], ids=["full", "padded"]),
]


def every_case(test):
    for case in cases:
        test = case(test)
    return test


def qkv(shape, value_width=5, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    width = shape[-1]
    return tuple(rng.standard_normal((*shape[:-1], w)).astype(dtype) for w in (width, width, value_width))


def softmax(Q, K):
    s = Q @ np.swapaxes(K, -1, -2) / math.sqrt(Q.shape[-1])
    A = np.exp(s - s.max(axis=-1, keepdims=True))
    return A / A.sum(axis=-1, keepdims=True)


def gradients(Q, K, V, lam, dO, **options):
    _, cache = streaming_attention(Q, K, V, lam, **options)
    return streaming_attention_backward(dO, cache)


@pytest.fixture
def short_stripes(monkeypatch):
    monkeypatch.setattr(streaming, "ROWS", 3)  # L = 10 gives four stripes, the last of one row


@every_case
def test_equals_softmax_then_refine_then_values(short_stripes, variant, causal, include_self, valid):
    Q, K, V = qkv((2, 3, 10, 4))
    options = {"variant": variant, "causal": causal, "include_self": include_self, "valid": valid}
    output, _ = streaming_attention(Q, K, V, LAM, **options)
    np.testing.assert_allclose(output, ms.refine(softmax(Q, K), LAM, **options) @ V, rtol=0, atol=EXACT)


@every_case
def test_gradient(short_stripes, variant, causal, include_self, valid):
    options = {"variant": variant, "causal": causal, "include_self": include_self, "valid": valid}
    check_vjp(
        lambda Q, K, V, lam: streaming_attention(Q, K, V, lam, **options)[0],
        lambda dO, Q, K, V, lam: gradients(Q, K, V, lam, dO, **options),
        [*qkv((2, 3, 10, 4)), LAM],
        np.random.default_rng(3),
        directions=2,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_equals_algorithm_1_in_loops(short_stripes, causal):
    Q, K, V = qkv((6, 4))
    A = np.tril(softmax(Q, K)) if causal else softmax(Q, K)
    output, _ = streaming_attention(Q, K, V, 0.7, causal=causal)
    np.testing.assert_allclose(output, ms.algorithm1(A, 0.7, causal=causal) @ V, rtol=0, atol=EXACT)


@pytest.mark.parametrize("rows", [1, 4, 5, 10])
@pytest.mark.parametrize("variant", ["original", "high", "elemmul"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_length_of_a_stripe_does_not_matter(monkeypatch, rows, variant, causal):
    (Q, K, V), dO = qkv((10, 4)), qkv((10, 5), seed=1)[0]
    whole = gradients(Q, K, V, 0.7, dO, variant=variant, causal=causal)  # one stripe: ROWS is more than 10
    monkeypatch.setattr(streaming, "ROWS", rows)
    for x, wanted in zip(gradients(Q, K, V, 0.7, dO, variant=variant, causal=causal), whole, strict=True):
        np.testing.assert_allclose(x, wanted, rtol=0, atol=EXACT)


def test_padding_equals_the_sequence_alone_and_no_token_at_all_gives_zero(short_stripes):
    (Q, K, V), dO = qkv((2, 10, 4)), qkv((2, 10, 5), seed=1)[0]
    valid = np.stack([np.arange(10) < 7, np.zeros(10, bool)])
    for variant in ("original", "high", "low", "elemmul"):
        output, cache = streaming_attention(Q, K, V, 0.7, variant=variant, valid=valid)
        *padded, dlam = streaming_attention_backward(dO, cache)
        alone, cache = streaming_attention(Q[0, :7], K[0, :7], V[0, :7], 0.7, variant=variant)
        *wanted, dlam_alone = streaming_attention_backward(dO[0, :7], cache)
        assert dlam == pytest.approx(dlam_alone, abs=EXACT)
        for x, y in zip([output, *padded], [alone, *wanted], strict=True):
            np.testing.assert_allclose(x[0, :7], y, rtol=0, atol=EXACT)
            assert (x[0, 7:] == 0).all() and (x[1] == 0).all()


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
def test_causal_form_neither_sees_the_future_nor_sends_it_a_gradient(short_stripes, variant):
    before = qkv((10, 4))
    after = [x.copy() for x in before]
    for x, other in zip(after, qkv((10, 4), seed=2), strict=True):
        x[5:] = other[5:]  # in the middle of a stripe
    outputs = [streaming_attention(*x, 0.7, variant=variant, causal=True)[0] for x in (before, after)]
    assert np.array_equal(outputs[0][:5], outputs[1][:5])
    dO = qkv((10, 5), seed=1)[0]
    dO[5:] = 0
    *into, _ = gradients(*before, 0.7, dO, variant=variant, causal=True)
    assert all((dx[5:] == 0).all() for dx in into)


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_against_float64(variant, causal):
    Q, K, V = qkv((100, 16), value_width=16, dtype=np.float32)
    Q[:, 0], K[0, 0] = 4, 3  # a sink: a score of 3 beside scores of order 1
    dO = qkv((100, 16), seed=1, dtype=np.float32)[0]
    results = []
    for dtype in (np.float32, np.float64):
        output, cache = streaming_attention(*(x.astype(dtype) for x in (Q, K, V)), 0.2, variant=variant, causal=causal)
        results.append([output, *streaming_attention_backward(dO.astype(dtype), cache)])
    (*arrays, dlam), (*wanted, dlam_wanted) = results
    for x, y in zip(arrays, wanted, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=0, atol=SINGLE * max(1, np.abs(y).max()))  # a sink collects 100 rows
    assert dlam == pytest.approx(dlam_wanted, abs=100 * SINGLE)  # and lam what 100 rows say about each label


@pytest.mark.parametrize(("L", "lam"), [(600, -20.0), (4096, 20.0)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_column_that_is_all_but_one_hot_survives(L, lam, causal):
    Q, K, V = qkv((L, 2), value_width=2, dtype=np.float32)
    Q[:, 0], K[:, 0], K[0, 0], V[:, 0] = 10, 0, 20, 1  # token 0 is some e^140 times as likely as another
    output, cache = streaming_attention(Q, K, V, lam, causal=causal)
    assert output.dtype == np.float32 and np.isfinite(output).all()
    np.testing.assert_allclose(output[:, 0], 1, atol=1e-5)  # the sum of a row of B, up to 4096 terms of float32
    assert all(np.isfinite(dx).all() for dx in streaming_attention_backward(V, cache))


def test_a_sink_does_not_hide_priors_that_underflow():
    Q, K, V = qkv((300, 2), dtype=np.float32)
    Q[:, 0], K[:, 0], K[0, 0] = 10, 0, 20  # priors of some e^-140: zero in float32, not in float64
    output, _ = streaming_attention(Q, K, V, 1.0)
    exact = [x.astype(np.float64) for x in (Q, K, V)]
    wanted = ms.refine(softmax(*exact[:2]), 1.0) @ exact[2]
    dense = ms.refine(softmax(Q, K), 1.0) @ V
    np.testing.assert_allclose(output, wanted, rtol=0, atol=2e-5)  # scores of 140 are rounded at 140 * 6e-8 = 8e-6
    assert np.abs(dense - wanted).max() > 1


def test_gradient_of_rows_that_are_all_but_one_hot():
    # two rows on token 0 hear each other: dt is about e^15 there, 0.2 of it is rounding, and nearly all of it cancels
    rng = np.random.default_rng(1)
    for _ in range(20):
        Q, K, V, dO = (rng.standard_normal((2, 4)).astype(np.float32) for _ in range(4))
        Q[:], K[0] = 1, K[0] + 7.5  # a score of 15 beside scores of order 1
        wanted = gradients(*(x.astype(np.float64) for x in (Q, K, V)), 15.0, dO.astype(np.float64))
        for x, y in zip(gradients(Q, K, V, 15.0, dO), wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=2e-5)  # scores of 15 are rounded at 1e-6, K is up to 10


@pytest.mark.parametrize(("variant", "loud"), [("high", 1), ("elemmul", 1000)])
def test_what_later_rows_add_is_taken_off_without_a_trace(variant, loud):
    Q, K, V = qkv((300, 4), dtype=np.float32)
    Q[:, 0] = 10 * (np.arange(300) >= 10)
    K[0, 0], V[10:] = 6, loud * V[10:]  # 290 later rows say the same about token 0, e^-20 each
    dO = qkv((300, 5), seed=1, dtype=np.float32)[0]
    dO[10:] = 0
    *long, _ = gradients(Q, K, V, 20.0, dO, variant=variant, causal=True)
    *short, _ = gradients(Q[:10], K[:10], V[:10], 20.0, dO[:10], variant=variant, causal=True)
    for x, y in zip(long, short, strict=True):
        np.testing.assert_allclose(x[:10], y, rtol=0, atol=SINGLE)


def test_evidence_that_all_labels_share_costs_no_digits():
    Q, K, V = qkv((300, 4), dtype=np.float32)
    output, _ = streaming_attention(0.1 * Q, K, V, -20.0)  # every C_k is near 300 log(1 + e^20 / 300) = 4300
    wanted, _ = streaming_attention(*(x.astype(np.float64) for x in (np.float32(0.1) * Q, K, V)), -20.0)
    np.testing.assert_allclose(output, wanted, rtol=0, atol=1.4e-4)  # 300 logarithms near 14, rounded by 5e-7 each


def test_rows_that_agree_get_no_gradient_from_rounding():
    Q, K, V = qkv((300, 16), dtype=np.float32)
    Q[:, 0], K[0, 0] = 4, 5
    output, cache = streaming_attention(Q, K, V, 1.0, variant="low")
    np.testing.assert_allclose(output, np.broadcast_to(V[0], output.shape), atol=1e-7)  # everyone holds token 0
    dQ, dK, _, dlam = streaming_attention_backward(qkv((300, 16), seed=1, dtype=np.float32)[2], cache)
    # zero in truth; 300 values that nearly cancel leave 4e-4, unless their common part is taken off before
    assert max(np.abs(dQ).max(), np.abs(dK).max(), abs(dlam)) < 1e-6


def test_memory_is_linear_in_the_length():
    def peak(L, **options):
        (Q, K, V), dO = qkv((L, 16), value_width=16, dtype=np.float32), np.ones((L, 16), np.float32)
        tracemalloc.start()
        gradients(Q, K, V, 0.2, dO, **options)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    for variant in ("original", "high", "elemmul"):
        for causal in (False, True):
            short, long = (peak(L, variant=variant, causal=causal) for L in (1024, 2048))
            assert long < 2048 * 2048 * 4 / 2  # half of one (L, L) array of float32
            assert long < 2.2 * short  # linear is 2, quadratic 4; small objects are the rest


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes_are_kept_inputs_untouched_and_the_cache_can_be_used_twice(dtype):
    (Q, K, V), dO = qkv((2, 3, 10, 4), dtype=dtype), qkv((2, 3, 10, 5), seed=1, dtype=dtype)[0]
    for x in (Q, K, V, dO):
        x.flags.writeable = False
    for variant in ("original", "high", "low", "elemmul"):
        for causal in (False, True):
            output, cache = streaming_attention(Q, K, V, LAM, variant=variant, causal=causal)
            streaming_attention(V[..., :4], Q, K, LAM, variant=variant, causal=causal)  # remembers nothing
            *first, dlam = streaming_attention_backward(dO, cache)
            *again, _ = streaming_attention_backward(dO, cache)
            assert {x.dtype for x in (output, *first)} == {np.dtype(dtype)} and dlam.shape == LAM.shape
            assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))


def test_gradient_of_lam_has_its_shape():
    (Q, K, V), dO = qkv((2, 3, 10, 4)), qkv((2, 3, 10, 5), seed=1)[0]
    *_, shared = gradients(Q, K, V, 0.7, dO)
    *_, per_head = gradients(Q, K, V, np.full((3, 1, 1), 0.7), dO)
    *_, each = gradients(Q, K, V, np.full((2, 3, 1, 1), 0.7), dO)
    assert isinstance(shared, float) and per_head.shape == (3, 1, 1) and each.shape == (2, 3, 1, 1)
    np.testing.assert_allclose(per_head, each.sum(axis=0), rtol=0, atol=EXACT)
    assert shared == pytest.approx(each.sum(), abs=EXACT)
    assert gradients(Q, K, V, 0.7, dO, variant="elemmul")[3] == 0


X = np.ones((2, 5, 4))
NAN = np.full((2, 5, 4), np.nan)
BAD = {
    "variant unknown": ((X, X, X, 0.2), {"variant": "hi"}, ValueError, "variant: .*'hi'"),
    "Q a list": (([[1.0]], X, X, 0.2), {}, TypeError, "Q: "),
    "Q of integers": ((X.astype(int), X, X, 0.2), {}, TypeError, "Q: .*int64"),
    "Q a vector": ((X[0, 0], X, X, 0.2), {}, ValueError, r"Q: .*\(4,\)"),
    "K of another dtype": ((X, X.astype("f"), X, 0.2), {}, TypeError, "K: .*float32"),
    "K of another length": ((X, X[:, :4], X, 0.2), {}, ValueError, r"K: .*\(2, 5, 4\).*\(2, 4, 4\)"),
    "K with NaN": ((X, NAN, X, 0.2), {}, ValueError, r"K: .*finite.*\(2, 5, 4\)"),
    "V of other heads": ((X, X, X[:1], 0.2), {}, ValueError, r"V: .*\(2, 5, 4\).*\(1, 5, 4\)"),
    "V without width": ((X, X, X[..., :0], 0.2), {}, ValueError, r"V: .*\(2, 5, 0\)"),
    "no tokens": ((X[:, :0], X[:, :0], X[:, :0], 0.2), {}, ValueError, r"Q: .*\(2, 0, 4\)"),
    "scores overflow": ((1e200 * X, 1e200 * X, X, 0.2), {}, ValueError, "Q, K: .*float64"),
    "lam NaN": ((X, X, X, np.nan), {}, ValueError, "lam: "),
    "lam without the two axes": ((X, X, X, np.ones(2)), {}, ValueError, r"lam: .*\(2, 5, 5\).*\(2,\)"),
    "lam of too many heads": ((X, X, X, np.ones((3, 1, 1))), {}, ValueError, r"lam: .*\(3, 1, 1\)"),
    "valid not boolean": ((X, X, X, 0.2), {"valid": np.ones(5)}, TypeError, "valid: "),
    "valid of another length": ((X, X, X, 0.2), {"valid": np.ones(4, bool)}, ValueError, r"valid: .*\(4,\)"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD.keys())
def test_bad_input_is_named(case):
    arguments, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        streaming_attention(*arguments, **options)


@pytest.mark.parametrize("dO", [[1.0], np.ones((2, 5, 3)), X.astype(int), NAN], ids=["list", "shape", "integer", "NaN"])
def test_bad_upstream_gradient_is_named(dO):
    _, cache = streaming_attention(X, X, X, 0.2)
    with pytest.raises((TypeError, ValueError), match="dO: "):
        streaming_attention_backward(dO, cache)
