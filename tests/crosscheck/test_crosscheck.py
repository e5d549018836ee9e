"""The judge: what passes, what is named, and what must not fool it. In NumPy, so on short matrices where it can be."""

import json
import threading
import time

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.bp import algorithm1_row_product
from minisaobp.crosscheck.cases import METRICS, attention, golden_cases, judged_cases


def right(A, lam, valid=None, causal=False):
    """A refinement that a stranger could have written: Eqs. 7 to 11 in logarithms, without the self message."""
    hidden = np.zeros(A.shape, bool)
    if causal:
        hidden |= np.triu(np.ones(A.shape[-2:], bool), 1)
    if valid is not None:
        hidden |= ~(valid[..., :, None] & valid[..., None, :])
    A = np.where(hidden, 0, A)
    t = np.log1p(-(1 - np.exp(-np.asarray(lam, A.dtype))) * A)
    C = np.cumsum(t, -2) - t if causal else t.sum(-2, keepdims=True) - t
    b = A * np.exp(C - C.max(-1, keepdims=True))
    Z = b.sum(-1, keepdims=True)
    return b / np.where(Z > 0, Z, 1)


def wrong(A, lam):
    """Eq. 11 with the self message."""
    t = 1 - (1 - np.exp(-np.asarray(lam, A.dtype))) * A
    b = A * np.exp(np.log(t).sum(-2, keepdims=True))
    Z = b.sum(-1, keepdims=True)
    return b / np.where(Z > 0, Z, 1)


def judged(fn, **options):
    return ms.crosscheck(fn, **{"seed": 0, "max_length": 128} | options)


def test_a_right_function_passes_at_every_length_and_seed():
    for seed in range(3):
        verdict = judged(right, max_length=1024, seed=seed)
        assert verdict.passed and verdict.readings == [], str(verdict)
    assert "PASSED" in str(verdict).splitlines()[-1]


@pytest.mark.parametrize("variant", ["high", "low", "elemmul", "original"])
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
def test_ours_passes(variant, causal):
    verdict = judged(lambda A, lam, valid=None: ms.refine(A, lam, variant=variant, causal=causal, valid=valid),
                     variant=variant, causal=causal, max_length=1024)  # fmt: skip
    assert verdict.passed and all(o.passed for o in verdict.outcomes), str(verdict)


def test_ours_measures_pass():
    for what in METRICS:
        function = {"entropy": ms.attention_entropy}.get(what) or getattr(ms, what)
        assert judged(function, what=what).passed


def test_one_matrix_at_a_time_in_loops():
    def loops(A, lam):
        return ms.algorithm1(A, float(lam)).astype(A.dtype)

    assert judged(loops, one_matrix=True, max_length=16).passed
    assert "returns float64, expected float32" in str(judged(ms.algorithm1, one_matrix=True, max_length=16))
    literally = judged(algorithm1_row_product, one_matrix=True, max_length=16)
    assert literally.readings == ["row-product"], str(literally)
    assert judged(lambda A: float(ms.gtd(A)), what="gtd", one_matrix=True).passed


# ---- what must not fool it ------------------------------------------------------------------------------------------


def test_right_for_short_sequences_only():
    verdict = judged(lambda A, lam: right(A, lam) if A.shape[-1] <= 8 else wrong(A, lam))
    assert verdict.readings == ["self-message"]
    assert "Only at L >= 9 (passes up to L = 8)" in str(verdict), str(verdict)


def test_right_in_float64_only():
    def fn(A, lam):
        return right(A, lam) if A.dtype == np.float64 else wrong(A, lam)

    verdict = judged(fn)
    assert verdict.readings == ["self-message"] and "Only in float32" in str(verdict), str(verdict)


def test_right_for_one_lambda_only():
    verdict = judged(lambda A, lam: right(A, 0.2))
    assert verdict.readings == ["another-lambda"]
    assert "it uses lambda = 0.2 whatever it is given" in str(verdict).lower()
    halved = judged(lambda A, lam: right(A, lam / 2))
    assert halved.readings == ["another-lambda"] and "0.05 -> 0.025, 0.2 -> 0.1" in str(halved)


def test_a_function_that_writes_to_its_input():
    def fn(A, lam):
        B = right(A, lam)
        A *= 0
        return B

    verdict = judged(fn)
    assert not verdict.passed and "writes to its argument A" in str(verdict)


@pytest.mark.parametrize(
    ("fn", "says"),
    [
        (lambda A, lam: right(A, lam).astype(np.float32), "returns float32, expected float64"),
        (lambda A, lam: right(A, lam).astype(np.float64), "returns float64, expected float32"),
        (lambda A, lam: (right(A, lam) * 1000).astype(int), "returns int64, expected float64"),
        (lambda A, lam: right(A, lam) + 0j, "returns complex128, expected float64"),
        (lambda A, lam: right(A, lam)[0], "returns shape (3, 5, 5), expected (2, 3, 5, 5)"),
        (lambda A, lam: right(A, lam).tolist(), "returns list"),
        (lambda A, lam: None, "returns NoneType"),
        (lambda A, lam: {}["x"], "raises KeyError: 'x'"),
        (lambda A: A, "raises TypeError"),
    ],
)
def test_what_is_no_refined_attention(fn, says):
    verdict = judged(fn)
    assert not verdict.passed and says in str(verdict), str(verdict)


def test_a_shape_that_does_not_broadcast():
    for fn in (lambda A, lam: np.zeros(0), lambda A, lam: np.stack([right(A, lam)] * 7)):
        verdict = judged(fn, max_length=16)
        assert verdict.readings == [] and "returns shape" in str(verdict), str(verdict)


def test_nan_everywhere_is_not_the_empty_rows():
    verdict = judged(lambda A, lam: A * np.nan, max_length=16)
    assert verdict.readings == [] and "is not finite" in str(verdict), str(verdict)
    measure = str(judged(lambda A: np.zeros(A.shape[:2]), what="gtd", max_length=16))
    assert "in every case: every length\n" in measure, measure


def test_an_exception_without_words_or_with_strange_ones():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def mute(A, lam):
        raise Mute

    def strange(A, lam):
        raise ValueError("a\x1b[31m\x00\udc80b")

    assert "raises Mute" in str(judged(mute, max_length=16))
    assert "raises ValueError: a?[31m??b" in str(judged(strange, max_length=16))


def test_a_function_that_never_returns():
    before = threading.active_count()
    started = time.monotonic()

    def fn(A, lam):
        while True:
            pass

    verdict = judged(fn, limit=0.2)
    assert not verdict.passed and "does not return within 0.2 seconds" in str(verdict)
    assert time.monotonic() - started < 20 and threading.active_count() <= before + 1
    assert [o.kind for o in verdict.outcomes[:3]] == ["timeout", "timeout", "not asked"]


def test_a_function_that_ends_its_thread():
    def fn(A, lam):
        raise SystemExit

    assert "ended its thread" in str(judged(fn))


def test_a_function_that_is_random():
    rng = np.random.default_rng(0)
    verdict = judged(lambda A, lam: right(A, lam) * (1 + 1e-3 * rng.standard_normal()))
    assert not verdict.passed and "another answer when it is asked the same again" in str(verdict)
    assert str(verdict).splitlines()[-1].startswith("crosscheck FAILED: random |"), str(verdict)


def test_answers_learnt_by_heart():
    known = {case.A.tobytes(): case for case in golden_cases() if case.what == "refine" and case.variant == "high"}

    def fn(A, lam):
        return right(A, lam) if A.astype(np.float64).tobytes() in known else wrong(A, lam)

    verdict = judged(fn)
    assert verdict.readings == ["self-message"] and "Only in drawn cases" in str(verdict), str(verdict)
    ids = [[case.id for case in judged_cases("refine", "high", False, seed)] for seed in (1, 2)]
    assert ids[0] != ids[1]


def test_two_faults_at_once_are_rejected_and_named():
    def fn(A, lam):  # the self message, and the sign of lambda
        return wrong(A, -np.asarray(lam))

    verdict = judged(fn)
    assert not verdict.passed and verdict.readings == ["self-message", "sign-of-lambda"], str(verdict)
    assert verdict.explanation.together


def test_when_nothing_fits_it_says_where():
    def fn(A, lam):
        B = right(A, lam)
        if A.shape[-1] > 8:
            B[..., -1, :] = B[..., -1, ::-1]
        return B

    verdict = judged(fn)
    text = str(verdict)
    assert verdict.readings == [] and "none of the known readings" in text
    assert "only at L >= " in text and "only in the last row" in text, text


def test_a_guard_inside_the_logarithm():
    def fn(A, lam):
        t = np.log1p(-(1 - np.exp(-np.asarray(lam, A.dtype))) * A)
        l = np.log(A + 1e-5) + t.sum(-2, keepdims=True) - t
        b = np.exp(l - l.max(-1, keepdims=True))
        return b / b.sum(-1, keepdims=True)

    assert not judged(fn).passed


def test_the_report_shows_case_row_column_and_line_of_the_paper():
    text = str(judged(wrong))
    assert "Eq. 11 with the self message" in text and "Paper: Eq. 11 as printed" in text
    assert "First case: high-encoder-lam0.05 (L = 5, lambda = 0.05, float64)" in text
    assert "at (row 0, column 0): expected 0.1004728187, got" in text
    assert text.splitlines()[-1].startswith("crosscheck FAILED: self-message | must 3/")
    record = judged(wrong).as_json()
    first = next(case for case in record["cases"] if not case["passed"])
    assert record["readings"][0]["name"] == "self-message" and (first["row"], first["column"]) == (0, 0)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"what": "attention"}, "what: expected one of refine, entropy"),
        ({"variant": "BP-High"}, "variant: expected one of high, low"),
        ({"arrays": "tensorflow"}, "arrays: expected numpy, torch, jax or cupy"),
        ({"gradients": True}, "gradients: numpy has no derivatives"),
        ({"max_length": 2}, "max_length: expected a whole number >= 8"),
        ({"limit": 0}, "limit: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_wrong_arguments(options, says):
    with pytest.raises(ValueError, match=says):
        ms.crosscheck(right, **options)
    with pytest.raises(TypeError, match="fn: expected a function, got str"):
        ms.crosscheck("refine")


def test_inputs_are_the_same_numbers_in_float32():
    A = attention(3, (2, 3, 7, 7), causal=True)
    assert np.array_equal(A.astype(np.float32), A) and (A.sum(-1) == 1).all() and (np.triu(A, 1) == 0).all()
