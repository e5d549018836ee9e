import math

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.bp import bp_high
from minisaobp.bp.multistep import MAX_MESSAGES, refine_steps
from minisaobp.bp.refine import _potts_factor
from tests.gradient_check import check_vjp

ONE_STEP = 1e-12  # float64, L <= 8: a few dozen roundings of 1e-16 in either form
FLOODING = 1e-10  # the same, carried through three steps, each of which may amplify it by some e^lam
SYMMETRIC = np.exp(-0.4 * abs(np.subtract.outer(np.arange(6.0), np.arange(6.0))))
ASYMMETRIC = np.exp(np.random.default_rng(9).uniform(-1, 1, (6, 6)))


def attention(shape, seed=0, scale=1.0):
    A = np.exp(np.random.default_rng(seed).standard_normal(shape) * scale)
    return A / A.sum(-1, keepdims=True)


def flooding(A, psi, steps, damping=0.0, causal=False, include_self=False):
    """Eqs. 3-5 in loops, straight from the definition: psi[r, k] from every sender, who hears its neighbours."""
    L = len(A)
    A = np.tril(A) if causal else A
    phi = A / np.maximum(A.sum(-1, keepdims=True), 1e-300)
    hears = {j: [i for i in range(L) if A[i].any() and (i < j or (i > j and not causal))] for j in range(L)}
    for j in range(L):
        if include_self and A[j].any():
            hears[j].append(j)
    m = {(i, j): np.ones(L) / L for j in range(L) for i in hears[j]}
    for _ in range(steps):
        new = {}
        for i, j in m:
            cavity = phi[i] * math.prod((m[l, i] for l in hears[i] if l != j), start=np.ones(L))
            message = cavity @ psi
            message = (message / message.sum()) ** (1 - damping) * m[i, j] ** damping
            new[i, j] = message / message.sum()
        m = new
    B = np.array([phi[j] * math.prod((m[i, j] for i in hears[j]), start=np.ones(L)) for j in range(L)])
    return B / np.maximum(B.sum(-1, keepdims=True), 1e-300)


@pytest.mark.parametrize("lam", [0.2, -1.0, 20.0, -20.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_one_step_without_damping_is_the_closed_form(lam, causal, include_self):
    A = attention((2, 8, 8), scale=2.0)
    A = np.tril(A) / np.tril(A).sum(-1, keepdims=True) if causal else A
    B, _ = refine_steps(A, _potts_factor(lam, "high"), 1, causal=causal, include_self=include_self)
    wanted = ms.refine(A, lam, causal=causal, include_self=include_self)
    np.testing.assert_allclose(B, wanted, rtol=0, atol=ONE_STEP)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("lam", [0.2, 1.0, -1.0, 20.0, -20.0])
def test_steps_equal_the_factor_graph(steps, damping, lam):
    for L in (2, 3, 6):
        A = attention((L, L), seed=L)
        beliefs = ms.FactorGraph.from_attention(A, bp_high(lam, L)).run(steps, damping=damping).beliefs
        for B in (
            ms.refine(A, lam, steps=steps, damping=damping),
            ms.refine(A, -lam, variant="low", steps=steps, damping=damping),
            ms.refine_with_factor(A, bp_high(lam, L), steps=steps, damping=damping),
        ):
            np.testing.assert_allclose(B, list(beliefs.values()), rtol=0, atol=FLOODING)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_steps_equal_the_loops(steps, damping, causal, include_self):
    A = attention((6, 6), seed=1)
    A[2] = 0  # a token that sends nothing
    A[4, 1] = 0
    how = {"steps": steps, "damping": damping, "causal": causal, "include_self": include_self}
    for B, psi in (
        (ms.refine(A, 0.7, **how), bp_high(0.7, 6)),
        (ms.refine_with_factor(A, SYMMETRIC, **how), SYMMETRIC),
        (ms.refine_with_factor(A, ASYMMETRIC, **how), ASYMMETRIC),
    ):
        np.testing.assert_allclose(B, flooding(A, psi, **how), rtol=0, atol=FLOODING)
        assert (B[2] == 0).all() and B[4, 1] == 0


def test_steps_over_heads_and_sequences_equal_one_matrix_at_a_time():
    A = attention((2, 3, 5, 5))
    lam = np.array([0.1, -0.4, 3.0]).reshape(3, 1, 1)
    psi = np.exp(np.random.default_rng(1).uniform(-1, 1, (3, 5, 5)))
    B, C = ms.refine(A, lam, steps=2), ms.refine_with_factor(A, psi, steps=2)
    for h in range(3):
        np.testing.assert_allclose(B[:, h], ms.refine(A[:, h], float(lam[h, 0, 0]), steps=2), rtol=0, atol=ONE_STEP)
        np.testing.assert_allclose(C[:, h], ms.refine_with_factor(A[:, h], psi[h], steps=2), rtol=0, atol=ONE_STEP)


def test_causal_steps_do_not_see_later_rows_and_settle_after_one_step_per_token():
    A = attention((7, 7))
    changed = A.copy()
    changed[5:] = attention((7, 7), seed=5)[5:]
    before, after = (ms.refine(M, 0.6, causal=True, steps=3) for M in (A, changed))
    assert np.array_equal(before[:5], after[:5]) and not np.array_equal(before[5:], after[5:])
    settled = ms.refine(A, 0.6, causal=True, steps=6)  # news travels upwards only: from 0 to 6 in at most 6 steps
    np.testing.assert_allclose(ms.refine(A, 0.6, causal=True, steps=9), settled, rtol=0, atol=1e-15)
    assert abs(ms.refine(A, 0.6, causal=True, steps=2) - settled).max() > 1e-6


@pytest.mark.parametrize("damping", [0.0, 0.4])
def test_padding_equals_the_sequence_alone(damping):
    short, padded = attention((2, 5, 5), seed=1), attention((2, 8, 8), seed=2)
    padded[:, :5, :5] = short
    how = {"steps": 3, "damping": damping}
    psi = np.full((8, 8), 1e9)  # what padded labels would say is loud
    psi[:5, :5] = ASYMMETRIC[:5, :5]
    valid = np.arange(8) < 5
    for B, wanted in (
        (ms.refine(padded, 0.7, valid=valid, **how), ms.refine(short, 0.7, **how)),
        (
            ms.refine_with_factor(padded, psi, valid=valid, **how),
            ms.refine_with_factor(short, psi[:5, :5], **how),
        ),
    ):
        np.testing.assert_allclose(B[:, :5, :5], wanted, rtol=0, atol=FLOODING)
        assert (B[:, 5:] == 0).all() and (B[:, :, 5:] == 0).all()


def test_damping_keeps_that_share_of_the_log_message():
    # Two tokens: the message that 0 sends to 1 stays log t, so after s steps 1 - damping^s of it has arrived.
    A = np.array([[0.8, 0.2], [0.6, 0.4]])
    t = 1 + np.expm1(-0.9) * A[0]
    for steps in (1, 2, 5):
        wanted = A[1] * t ** (1 - 0.5**steps)
        B = ms.refine(A, 0.9, steps=steps, damping=0.5)
        np.testing.assert_allclose(B[1], wanted / wanted.sum(), rtol=0, atol=ONE_STEP)


def test_damping_calms_what_oscillates():
    # Identical rows and a strong factor: undamped flooding jumps between two states
    A = np.tile(attention((1, 6)), (6, 1))
    jump, rest = (
        abs(ms.refine(A, 3.0, steps=60, damping=d) - ms.refine(A, 3.0, steps=61, damping=d)).max() for d in (0.0, 0.5)
    )
    assert jump > 0.05 and rest < 1e-9  # measured: 0.067 and 1e-16; nothing in between occurs


@pytest.mark.parametrize("lam", [-80.0, 80.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_messages_stay_finite(lam, causal, dtype):
    L = 40
    A = np.full((L, L), 1e-6, dtype)
    A[:, 0] = 1  # all on one key
    A[3] = 1  # one that is free to choose
    A[5], A[7] = 0, np.eye(L)[0]
    B = ms.refine(A, lam, causal=causal, steps=3)
    dA, dlam = ms.refine_vjp(A, lam, np.random.default_rng(0).standard_normal((L, L)), causal=causal, steps=3)
    np.testing.assert_allclose(np.delete(B, 5, 0).sum(-1), 1, rtol=0, atol=1e-5)  # a float32 sum of 40 terms
    assert B.dtype == dA.dtype == dtype and np.isfinite(dA).all() and np.isfinite(dlam)
    assert (B[A == 0] == 0).all() and (dA[5] == 0).all()


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 5e-4), (np.float32, 1e-6)])
def test_short_dtypes_differ_from_float64_by_one_rounding(dtype, atol):
    # float32: the rounding of a normalised row, up to 1e-7, through 2 steps; float16: that of the result, 5e-4
    A = attention((3, 7, 7)).astype(dtype)
    A.flags.writeable = False
    B = ms.refine(A, 0.7, steps=2)
    assert B.dtype == dtype
    np.testing.assert_allclose(B, ms.refine(A.astype(np.float64), 0.7, steps=2), rtol=0, atol=atol)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradient(steps, damping, causal, include_self, padded):
    rng = np.random.default_rng(3)
    A = attention((2, 3, 5, 5)) * rng.uniform(0.5, 2, (2, 3, 5, 1))  # general row sums
    how = {"steps": steps, "damping": damping, "causal": causal, "include_self": include_self}
    how["valid"] = np.array([[True] * 5, [True, True, True, False, False]])[:, None] if padded else None
    lam = np.array([0.2, -0.5, 2.5]).reshape(3, 1, 1)
    for variant in ("high", "low"):
        check_vjp(
            lambda A, lam, variant=variant: ms.refine(A, lam, variant=variant, **how),
            lambda dB, A, lam, variant=variant: ms.refine_vjp(A, lam, dB, variant=variant, **how),
            [A, lam],
            rng,
            directions=1,
        )
    psi = np.exp(rng.uniform(-1, 1, (3, 5, 5))) * 1.7
    check_vjp(
        lambda A, psi: ms.refine_with_factor(A, psi, **how),
        lambda dB, A, psi: ms.refine_with_factor_vjp(A, psi, dB, **how),
        [A, psi],
        rng,
        directions=1,
    )


def test_gradient_at_an_exact_zero():
    A = attention((5, 5))
    A[2, 4] = 0
    A[2] /= A[2].sum()
    dB = np.random.default_rng(4).standard_normal((5, 5))
    dA, _ = ms.refine_vjp(A, 0.9, dB, steps=2)
    h = 1e-7
    moved = A.copy()
    moved[2, 4] = h  # one-sided: A cannot be negative
    numeric = np.sum(dB * (ms.refine(moved, 0.9, steps=2) - ms.refine(A, 0.9, steps=2))) / h
    assert dA[2, 4] == pytest.approx(numeric, rel=1e-5)  # a one-sided difference errs by about h


def test_messages_that_would_not_fit_are_refused():
    largest = round(MAX_MESSAGES ** (1 / 3))
    assert largest**3 == MAX_MESSAGES == 2**24  # L = 256, as the docstrings say
    L = largest + 1
    for how in ({"steps": 2}, {"damping": 0.1}):
        with pytest.raises(
            ValueError,
            match=rf"steps: .*1 matrices of {L} tokens .*{L**3} numbers, more than {MAX_MESSAGES}; .*steps=1",
        ):
            ms.refine(np.ones((L, L)), 0.2, **how)
    with pytest.raises(ValueError, match="steps: "):
        ms.refine_with_factor(np.ones((400, 40, 40)), np.ones((40, 40)), steps=2)


BAD = {
    "steps 0": ({"steps": 0}, "steps: .*0"),
    "steps a fraction": ({"steps": 1.5}, "steps: .*1.5"),
    "steps a truth value": ({"steps": True}, "steps: .*True"),
    "damping 1": ({"damping": 1.0}, "damping: .*1.0"),
    "damping negative": ({"damping": -0.1}, "damping: .*-0.1"),
    "damping NaN": ({"damping": math.nan}, "damping: .*nan"),
    "damping a word": ({"damping": "some"}, "damping: .*'some'"),
    "elemmul in two steps": ({"variant": "elemmul", "steps": 2}, "steps: .*'elemmul'"),
    "original in two steps": ({"variant": "original", "steps": 2}, "steps: .*'original'"),
    "elemmul damped": ({"variant": "elemmul", "damping": 0.5}, "steps: .*'elemmul'.*damping=0.5"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD.keys())
def test_bad_input_is_named(case):
    how, message = BAD[case]
    A = attention((3, 3))
    with pytest.raises(ValueError, match=message):
        ms.refine(A, 0.2, **how)
    with pytest.raises(ValueError, match=message):
        ms.refine_vjp(A, 0.2, A, **how)
    if "variant" not in how:
        with pytest.raises(ValueError, match=message):
            ms.refine_with_factor(A, np.ones((3, 3)), **how)
        with pytest.raises(ValueError, match=message):
            ms.refine_with_factor_vjp(A, np.ones((3, 3)), A, **how)
