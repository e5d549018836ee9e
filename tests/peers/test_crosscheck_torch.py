"""The judge on an independent PyTorch implementation, and on one copy of it for every known fault."""

import pytest

import minisaobp as ms

pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")

from tests.peers import crosscheck_torch as peer


def judged(fn, seed=0, **options):
    return ms.crosscheck(fn, arrays="torch", seed=seed, **options)


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (peer.saobp, {}),
        (peer.saobp_low, {"variant": "low"}),
        (peer.saobp_causal, {"causal": True}),
        (peer.elemmul, {"variant": "elemmul"}),
        (peer.elemmul_causal, {"variant": "elemmul", "causal": True}),
    ],
)
def test_the_reference_passes_with_its_gradients(fn, options):
    verdict = judged(fn, gradients=True, **options)
    assert verdict.passed, str(verdict)
    assert verdict.readings == [] and not verdict.notes, str(verdict)


SIGN = ["sign-of-lambda", "eq6-positive-beta"]  # the same function after normalisation: both are named
# where two are named, the function makes two: a direct product, or an empty row that is 0/0
FAULTS = [
    (peer.self_message, {}, ["self-message"]),
    (peer.row_product, {}, ["row-product", "direct-product-overflows"]),
    (peer.wrong_sign, {}, SIGN),
    (peer.saobp, {"variant": "low"}, SIGN),
    (peer.eq6_positive_beta, {}, [*SIGN, "empty-rows-poison"]),
    (peer.lambda_for_exp, {}, ["lambda-for-exp", "empty-rows-poison", "direct-product-overflows"]),
    (peer.over_columns, {}, ["over-columns"]),
    (peer.transposed, {}, ["transposed"]),
    (peer.transposed_input, {}, ["transposed"]),
    (peer.prior_left_out, {}, ["prior-left-out"]),
    (peer.not_normalised, {}, ["not-normalised"]),
    (peer.direct_product, {}, ["direct-product-overflows"]),
    (peer.direct_product_low, {"variant": "low"}, ["direct-product-overflows"]),
    (peer.future_leaks, {"causal": True}, ["future-leaks"]),
    (peer.padded_rows_send, {}, ["padded-rows-send"]),
    (peer.empty_rows_poison, {}, ["empty-rows-poison"]),
    (peer.elemmul_a_a, {"variant": "elemmul"}, ["elemmul-as-power"]),
    (peer.elemmul_a_a, {"variant": "elemmul", "causal": True}, ["elemmul-as-power"]),
    (peer.elemmul_unmasked, {"variant": "elemmul"}, ["elemmul-without-mask"]),
    (peer.elemmul_unmasked, {"variant": "elemmul", "causal": True}, ["elemmul-without-mask"]),
    (peer.half_precision, {}, ["half-precision"]),
    (peer.half_loop, {}, ["half-precision"]),
    (peer.bfloat16, {}, ["half-precision"]),
    (peer.two_steps, {}, ["two-steps", "empty-rows-poison"]),
    (peer.fed_back, {}, ["fed-back"]),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("fn", "options", "readings"), FAULTS)
def test_a_fault_is_named(fn, options, readings, seed):
    verdict = judged(fn, seed, **options)
    assert not verdict.passed
    assert verdict.readings == readings, str(verdict)


@pytest.mark.parametrize(("what", "fn", "reading"), peer.METRIC_FAULTS)
def test_a_fault_of_a_measure_is_named(what, fn, reading):
    verdict = judged(fn, what=what)
    assert verdict.passed == (reading is None)
    assert verdict.readings == ([] if reading is None else [reading]), str(verdict)


COMBINED = {
    "fed back, wrong sign": (lambda A, lam: peer.fed_back(A, -lam), {}),
    "self message, not normalised": (lambda A, lam: peer.self_message(A, lam) * A.sum(-1, keepdim=True) * 2, {}),
    "self message, half precision": (lambda A, lam: peer.self_message(A.half(), lam).to(A.dtype), {}),
    "prior left out, transposed": (lambda A, lam: peer.prior_left_out(A, lam).transpose(-1, -2), {}),
    "future leaks, half lambda": (lambda A, lam: peer.future_leaks(A, lam / 2), {"causal": True}),
    "A A, without the mask": (lambda A, lam: peer.rows(A @ A @ A), {"variant": "elemmul", "causal": True}),
}


@pytest.mark.parametrize("name", COMBINED)
def test_two_faults_at_once_are_rejected(name):
    fn, options = COMBINED[name]
    assert not judged(fn, **options).passed


def test_a_wrong_derivative_is_found():
    def constant_messages(A, lam):
        m = peer.log_messages(A, lam).detach()
        return peer.masked_softmax(peer.log_prior(A, A == 0) + m.sum(-2, keepdim=True) - m, A == 0)

    assert judged(constant_messages).passed
    verdict = judged(constant_messages, gradients=True)
    assert not verdict.passed and "as if the messages were constants" in str(verdict), str(verdict)
    assert "the gradient of lambda is not judged" in str(verdict)
