import multiprocessing
import os

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.backend import PIECE
from minisaobp.bp import algorithm1_row_product, bp_high, bp_low, potts
from minisaobp.bp.refinement import beliefs, normalise_rows, potts_messages
from tests.gradient_check import check_vjp


def attention(shape, seed=0, scale=2.0, dtype=np.float64):
    A = np.exp(np.random.default_rng(seed).standard_normal(shape) * scale)
    return (A / A.sum(-1, keepdims=True)).astype(dtype)


EXAMPLE = attention((8, 8))  # the 8 x 8 example whose numbers the tests below quote
EXACT = 1e-12  # float64, L <= 12: a few dozen roundings of 1e-16 in either form


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.2, 1.0, -0.2, 20.0, -20.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_loops_and_vectorised_form_agree(lam, causal, include_self):
    A = np.tril(EXAMPLE) if causal else EXAMPLE
    A = A / A.sum(-1, keepdims=True)
    loops = ms.algorithm1(A, lam, causal=causal, include_self=include_self)
    np.testing.assert_allclose(ms.refine(A, lam, causal=causal, include_self=include_self), loops, rtol=0, atol=EXACT)


def test_bp_low_is_bp_high_at_minus_lam():
    np.testing.assert_allclose(ms.refine(EXAMPLE, 0.3, variant="low"), ms.algorithm1(EXAMPLE, -0.3), atol=EXACT)
    assert np.array_equal(bp_low(0.3, 5), bp_high(-0.3, 5))


def test_eq7_is_a_multiple_of_eq6():
    np.testing.assert_allclose(bp_high(0.2, 6), np.exp(0.2) * potts(-0.2, 6), rtol=1e-15)


def test_self_message_is_the_difference_between_algorithm_1_and_eq_11():
    algorithm1, eq11 = ms.refine(EXAMPLE, 0.2), ms.refine(EXAMPLE, 0.2, include_self=True)
    assert abs(algorithm1 - eq11).max() == pytest.approx(0.0240, abs=5e-5)
    gain = [float(ms.attention_entropy(B) - ms.attention_entropy(EXAMPLE)) for B in (eq11, algorithm1)]
    assert gain == pytest.approx([0.0348, -0.0025], abs=5e-5)  # Eq. 11's gain is a small loss under Algorithm 1


def test_row_product_reading_hears_nobody_and_sharpens():
    B = algorithm1_row_product(EXAMPLE, 0.2)
    alone = EXAMPLE[3] / (1 + np.expm1(-0.2) * EXAMPLE[3])  # A_3k / m_3(k): row 3 alone decides
    np.testing.assert_allclose(B[3], alone / alone.sum(), rtol=1e-14)
    assert ms.attention_entropy(B) < ms.attention_entropy(EXAMPLE)


def test_first_order_form():
    tax = -np.expm1(-0.2) * (EXAMPLE.sum(0) - EXAMPLE)
    B = EXAMPLE * np.exp(-tax)
    B /= B.sum(-1, keepdims=True)
    assert abs(B - ms.refine(EXAMPLE, 0.2)).max() == pytest.approx(1.6e-3, abs=5e-5)


@pytest.mark.parametrize(("L", "kept"), [(64, 1.2e-4), (512, 2.7e-39)])
def test_tax_on_a_shared_key_grows_with_length(L, kept):
    A = np.full((L, L), 0.1 / (L - 1))
    A[:, 0] = 0.9
    assert ms.refine(A, 0.2)[1, 0] == pytest.approx(kept, rel=0.04)  # half a unit of the second digit


def test_direct_product_overflows_and_the_closed_form_does_not():
    for L, finite in ((443, True), (445, False)):
        with np.errstate(over="ignore"):
            assert np.isfinite(np.prod(np.full(L, np.exp(np.float32(0.2)), np.float32))) == finite
    B = ms.refine(attention((512, 512), dtype=np.float32), 0.2)
    assert np.isfinite(B).all()


@pytest.mark.parametrize("L", [1, 2, 7, 64, 300, 4096])
@pytest.mark.parametrize("lam", [-80.0, -20.0, 0.2, 20.0, 80.0])
@pytest.mark.parametrize("causal", [False, True])
def test_one_hot_columns_survive(L, lam, causal):
    A = np.zeros((L, L), np.float32)
    A[:, 0] = 1
    A[L // 2] = 1 / L  # one row that is free to choose
    B = ms.refine(A, lam, causal=causal)
    assert B.dtype == np.float32 and np.isfinite(B).all()
    np.testing.assert_allclose(B.sum(-1), 1, atol=1e-5)  # a float32 sum of up to 4096 terms
    assert (B[A == 0] == 0).all()


def test_rows_that_products_cannot_hold_are_computed_in_logs():
    # everyone shares key 0 but row 3, which spreads; row 5 has nothing but keys 0 and 1
    L = 40
    A = np.zeros((L, L), np.float32)
    A[:, 0], A[:, 1] = 0.5, 0.5
    A[3] = 1 / L
    wanted = ms.refine(A.astype(np.float64), 15.0)
    np.testing.assert_allclose(ms.refine(A, 15.0), wanted, atol=5e-6)  # 40 messages, float32
    np.testing.assert_allclose(wanted[5, :2], ms.algorithm1(A, 15.0)[5, :2], atol=EXACT)


def test_a_row_that_is_one_hot_up_to_rounding_sends_what_it_holds_elsewhere():
    # 1 - P_00 is 1e-8, five times e^-20, yet P_00 rounds to 1 in float32
    A = np.array([[1, 1e-8], [1, 1e-8]], np.float32)
    wanted = ms.refine(A.astype(np.float64), 20.0)
    assert wanted[0, 0] == pytest.approx(0.546, abs=1e-3)
    np.testing.assert_allclose(ms.refine(A, 20.0), wanted, atol=5e-6)  # a few roundings of 6e-8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_entries_that_are_half_a_row_each_rounded_up(dtype):
    # the row's sum is 1 but for rounding, so that it stays as it is; neither of the two has all of the row
    A = np.full((4, 4), 0.25, dtype)
    A[1] = [np.nextafter(dtype(0.5), dtype(1))] * 2 + [0, 0]
    halves = A.astype(np.float64)
    halves[1, :2] = 0.5
    np.testing.assert_allclose(ms.refine(A, 8.0), ms.refine(halves, 8.0), atol=5 * np.finfo(dtype).eps)


def test_a_weight_that_underflows_beside_its_own_message_is_not_lost():
    # The others leave (3e-8)^3 of key 0, a third of what row 0 has of key 1; times row 0's own 1e-22 it is 3e-45, which
    # float32 rounds to two units of its smallest number.
    A = np.zeros((4, 4), np.float32)
    A[0, :2] = 1, 1e-22
    A[1:, 0], A[1:, 2] = 1, 3e-8
    wanted = ms.refine(A.astype(np.float64), 80.0)
    assert wanted[0, 0] == pytest.approx(0.2126, abs=1e-3)  # 0.27 / (1 + 0.27)
    np.testing.assert_allclose(ms.refine(A, 80.0), wanted, atol=5e-6)  # a few roundings of 6e-8


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
def test_padding_equals_the_sequence_alone(variant):
    short = attention((2, 5, 5), seed=1)
    padded = attention((2, 8, 8), seed=2)
    padded[:, :5, :5] = short
    valid = np.arange(8) < 5
    B = ms.refine(padded, 0.7, variant=variant, valid=valid)
    np.testing.assert_allclose(B[:, :5, :5], ms.refine(short, 0.7, variant=variant), atol=EXACT)
    assert (B[:, 5:] == 0).all() and (B[:, :, 5:] == 0).all()


def test_an_empty_row_stays_empty_and_sends_nothing():
    A = EXAMPLE.copy()
    A[2] = 0
    B = ms.refine(A, 0.5)
    others = np.delete(np.arange(8), 2)
    t = 1 + np.expm1(-0.5) * A[others]
    C = np.log(t).sum(0) - np.log(t)
    wanted = A[others] * np.exp(C)
    np.testing.assert_allclose(B[others], wanted / wanted.sum(-1, keepdims=True), atol=EXACT)
    assert (B[2] == 0).all()


def test_row_sums_do_not_matter():
    scaled = EXAMPLE * np.arange(1.0, 9.0)[:, None]
    np.testing.assert_allclose(ms.refine(scaled, 0.2), ms.refine(EXAMPLE, 0.2), atol=EXACT)
    np.testing.assert_allclose(ms.algorithm1(scaled, 0.2), ms.refine(EXAMPLE, 0.2), atol=EXACT)


def test_causal_form_does_not_see_later_rows_and_the_leaking_form_does():
    A = np.tril(attention((16, 16), scale=1.0))
    A /= A.sum(-1, keepdims=True)
    changed = A.copy()
    later = np.tril(attention((16, 16), seed=5, scale=1.0))[10:]
    changed[10:] = later / later.sum(-1, keepdims=True)
    for variant in ("high", "low", "elemmul"):
        before, after = (ms.refine(M, 0.2, variant=variant, causal=True) for M in (A, changed))
        assert np.array_equal(before[:10], after[:10])
    leak = abs(ms.refine(A, 0.2)[:10] - ms.refine(changed, 0.2)[:10]).max()  # only the zeros of A as a mask
    assert 0.005 < leak < 0.05


def test_lam_zero_gives_a_back():
    np.testing.assert_allclose(ms.refine(EXAMPLE, 0.0), EXAMPLE, atol=EXACT)


def test_per_head_lam_equals_one_head_at_a_time():
    A = attention((2, 3, 6, 6))
    lam = np.array([0.1, -0.4, 3.0]).reshape(3, 1, 1)
    B = ms.refine(A, lam)
    for h in range(3):
        np.testing.assert_allclose(B[:, h], ms.refine(A[:, h], float(lam[h, 0, 0])), atol=EXACT)


def test_elemmul_is_the_normalised_gram_matrix():
    B = ms.refine(EXAMPLE, 0.0, variant="elemmul")
    wanted = np.array([[sum(EXAMPLE[i, k] * EXAMPLE[j, k] for k in range(8)) for j in range(8)] for i in range(8)])
    np.testing.assert_allclose(B, wanted / wanted.sum(-1, keepdims=True), atol=EXACT)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtype_is_kept_and_the_input_is_not_touched(dtype):
    A = EXAMPLE.astype(dtype)
    A.flags.writeable = False
    for variant in ("original", "high", "low", "elemmul"):
        assert ms.refine(A, 0.2, variant=variant).dtype == dtype
    # float32: 8 messages of 6e-8 each; float16 is computed in float32 and rounded once, to 5e-4 relative
    atol = {np.float16: 5e-4, np.float32: 5e-6, np.float64: EXACT}[dtype]
    np.testing.assert_allclose(ms.refine(A, 0.2), ms.refine(A.astype(np.float64), 0.2), atol=atol)


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient(variant, causal, include_self, padded):
    rng = np.random.default_rng(3)
    A = attention((2, 3, 5, 5), scale=1.0) * rng.uniform(0.5, 2, (2, 3, 5, 1))  # general row sums
    lam = np.array([0.2, -0.5, 2.5]).reshape(3, 1, 1)
    options = {"variant": variant, "causal": causal, "include_self": include_self}
    options["valid"] = np.array([[True] * 5, [True, True, True, False, False]])[:, None] if padded else None
    check_vjp(
        lambda A, lam: ms.refine(A, lam, **options),
        lambda dB, A, lam: ms.refine_vjp(A, lam, dB, **options),
        [A, lam],
        rng,
    )


def test_gradient_at_an_exact_zero_is_the_ratio():
    A = EXAMPLE.copy()
    A[2, 4] = 0
    A[2] /= A[2].sum()
    dB = np.random.default_rng(4).standard_normal((8, 8))
    dA, _ = ms.refine_vjp(A, 0.2, dB)
    h = 1e-7
    moved = A.copy()
    moved[2, 4] = h  # one-sided: A cannot be negative
    numeric = np.sum(dB * (ms.refine(moved, 0.2) - ms.refine(A, 0.2))) / h
    assert dA[2, 4] == pytest.approx(numeric, rel=1e-5)  # a one-sided difference errs by about h


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_gradient_beyond_the_dtype_is_its_largest_number(dtype):
    A = np.zeros((12, 12), dtype)
    A[:, 0] = 1e-5 if dtype == np.float16 else 1e-35  # the causal mask hides the rest of each row
    A[:, 11] = 1
    dB = np.random.default_rng(4).standard_normal((12, 12)).astype(dtype)
    dA, dlam = ms.refine_vjp(A, 20.0, dB, causal=True)
    assert dA.dtype == dtype and np.isfinite(dA).all() and np.isfinite(dlam)
    assert abs(dA[5, 1]) == pytest.approx(np.finfo(dtype).max, rel=0.51)  # half of it before the last cast
    assert (np.triu(dA, 1) == 0).all()


def test_gradient_of_lam_is_a_float_for_a_number():
    _, dlam = ms.refine_vjp(EXAMPLE, 0.2, EXAMPLE)
    assert isinstance(dlam, float)


def test_messages_and_beliefs_are_usable_alone():
    P, S = normalise_rows(EXAMPLE)
    np.testing.assert_allclose(S, 1)
    B, ratio = beliefs(P, potts_messages(P, 0.2), 0.2)
    np.testing.assert_allclose(P * ratio, B, atol=EXACT)
    np.testing.assert_allclose(B, ms.algorithm1(EXAMPLE, 0.2), atol=EXACT)


BAD = {
    "A is a list": ([[1.0]], 0.2, {}, TypeError, "A: "),
    "A not square": (np.ones((3, 4)), 0.2, {}, ValueError, r"A: .*\(3, 4\)"),
    "A a vector": (np.ones(4), 0.2, {}, ValueError, r"A: .*\(4,\)"),
    "A empty": (np.ones((0, 0)), 0.2, {}, ValueError, "A: "),
    "A of integers": (np.eye(3, dtype=int), 0.2, {}, TypeError, "A: .*int"),
    "A complex": (np.eye(3, dtype=complex), 0.2, {}, TypeError, "A: .*complex"),
    "A negative": (-np.eye(3), 0.2, {}, ValueError, r"A: .*-1.0 at \(0, 0\)"),
    "A with NaN": (np.array([[1.0, np.nan], [0, 1]]), 0.2, {}, ValueError, r"A: .*nan at \(0, 1\)"),
    "A with inf": (np.array([[1.0, np.inf], [0, 1]]), 0.2, {}, ValueError, r"A: .*inf at \(0, 1\)"),
    "lam NaN": (np.eye(3), np.nan, {}, ValueError, "lam: "),
    "lam huge": (np.eye(3), 81, {}, ValueError, "lam: "),
    "lam a word": (np.eye(3), "big", {}, TypeError, "lam: "),
    "lam without the two axes": (np.ones((3, 3, 3)), np.ones(3), {}, ValueError, r"lam: .*\(3,\)"),
    "lam of too many heads": (np.ones((2, 3, 3)), np.ones((4, 1, 1)), {}, ValueError, r"lam: .*\(4, 1, 1\)"),
    "variant unknown": (np.eye(3), 0.2, {"variant": "hi"}, ValueError, "variant: .*'hi'"),
    "valid not boolean": (np.eye(3), 0.2, {"valid": np.ones(3)}, TypeError, "valid: "),
    "valid of another length": (np.eye(3), 0.2, {"valid": np.ones(2, bool)}, ValueError, r"valid: .*\(2,\)"),
    "A with a mask": (np.ma.masked_array(np.eye(3)), 0.2, {}, TypeError, "A: .*mask"),
    "A too large to sum": (np.full((3, 3), 3e38, np.float32), 0.2, {}, ValueError, "A: .*sums"),
    "lam a truth value": (np.eye(3), True, {}, TypeError, "lam: "),
    "lam complex": (np.eye(3), np.array(1j), {}, TypeError, "lam: "),
    "lam beyond floats": (np.eye(3), 10**400, {}, TypeError, "lam: "),
    "valid of length one": (np.eye(3), 0.2, {"valid": np.ones(1, bool)}, ValueError, r"valid: .*\(1,\)"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD.keys())
def test_bad_input_is_named(case):
    A, lam, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ms.refine(A, lam, **options)
    with pytest.raises(error, match=message):
        ms.refine_vjp(A, lam, np.ones((3, 3)), **options)


@pytest.mark.parametrize("dB", [np.ones((3, 4)), np.eye(3, dtype=int), np.full((3, 3), np.nan)])
def test_bad_upstream_gradient_is_named(dB):
    with pytest.raises((TypeError, ValueError), match="dB: "):
        ms.refine_vjp(np.eye(3), 0.2, dB)


@pytest.mark.parametrize("function", [ms.algorithm1, algorithm1_row_product])
def test_bad_input_to_the_loops_is_named(function):
    with pytest.raises(ValueError, match="A: "):
        function(np.ones((2, 3, 3)), 0.2)
    with pytest.raises(ValueError, match="lam: "):
        function(np.eye(3), np.inf)


def test_no_matrices_at_all():
    A = np.zeros((0, 5, 5))
    assert ms.refine(A, 0.2).shape == ms.refine(A, 0.2, steps=2).shape == A.shape
    dA, dlam = ms.refine_vjp(A, 0.2, A)
    assert dA.shape == A.shape and dlam == 0


def test_a_matrix_subclass_is_an_array():
    B = ms.refine(EXAMPLE.view(np.matrix), 0.2)
    assert type(B) is np.ndarray and np.array_equal(B, ms.refine(EXAMPLE, 0.2))


def test_a_stack_in_threads_equals_one_matrix_at_a_time():
    A, dB = attention((130, 100, 100), seed=6), attention((130, 100, 100), seed=7)  # more numbers than one piece
    assert A.size > PIECE
    B, (dA, dlam) = ms.refine(A, 0.2), ms.refine_vjp(A, 0.2, dB)
    singly = [ms.refine_vjp(A[n], 0.2, dB[n]) for n in range(len(A))]
    for n in (0, 77, 129):
        assert np.array_equal(B[n], ms.refine(A[n], 0.2)) and np.array_equal(dA[n], singly[n][0])
    assert dlam == pytest.approx(sum(one for _, one in singly), rel=1e-12)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    A = attention((130, 100, 100), dtype=np.float32)
    wanted = ms.refine(A, 0.2).sum()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(_sum_of_refined, (A,)).get(timeout=60) == wanted


def _sum_of_refined(A):
    return ms.refine(A, 0.2).sum()


def test_the_upstream_gradient_of_a_half_precision_matrix_is_not_rounded_to_it():
    A, dB = EXAMPLE.astype(np.float16), np.full((8, 8), 1e5, np.float32)  # beyond float16, which ends at 65504
    dB[:, 0] += 1
    dA, dlam = ms.refine_vjp(A, 0.2, dB)
    assert np.isfinite(dA).all() and dlam == ms.refine_vjp(A.astype(np.float32), 0.2, dB)[1] != 0
