import itertools

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.bp import bp_high, potts
from minisaobp.bp.custom_factor import _as_factor
from minisaobp.bp.multistep import refine_steps
from minisaobp.bp.refinement import normalise_rows
from tests.gradient_check import check_vjp

EXACT = 1e-12  # float64, L <= 8: a few dozen roundings of 1e-16


def attention(shape, seed=0, scale=1.0):
    A = np.exp(np.random.default_rng(seed).standard_normal(shape) * scale)
    return A / A.sum(-1, keepdims=True)


def random_factor(shape, seed=1, range_=2.0):
    return np.exp(np.random.default_rng(seed).uniform(-range_ / 2, range_ / 2, shape))


def loops(A, psi, causal=False, include_self=False):
    """Eqs. 8-11 with psi in the place of Eq. 7."""
    L = len(A)
    B = A.copy()
    for j, i in itertools.product(range(L), range(L)):
        if A[i].any() and (i < j or (i > j and not causal) or (i == j and include_self)):
            B[j] *= [sum(A[i, r] * psi[r, k] for r in range(L)) for k in range(L)]
            B[j] /= max(B[j].sum(), 1e-300)  # an empty row stays
    return B


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
def test_equals_the_loops(causal, include_self):
    A, psi = attention((8, 8)), random_factor((8, 8))
    A[3], A[5, 1] = 0, 0
    A = np.tril(A) if causal else A
    A /= np.maximum(A.sum(-1, keepdims=True), 1e-300)
    B = ms.refine_with_factor(A, psi, causal=causal, include_self=include_self)
    np.testing.assert_allclose(B, loops(A, psi, causal, include_self), rtol=0, atol=EXACT)
    assert (B[3] == 0).all() and B[5, 1] == 0


@pytest.mark.parametrize("lam", [0.2, 3.0, -3.0, 40.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_factors_of_the_paper(lam, causal):
    A = attention((2, 8, 8))
    wanted = ms.refine(A, lam, causal=causal)
    for psi in (bp_high(lam, 8), potts(-lam, 8), 1e200 * bp_high(lam, 8)):
        np.testing.assert_allclose(ms.refine_with_factor(A, psi, causal=causal), wanted, rtol=0, atol=EXACT)


def test_equals_the_factor_graph():
    A, psi = attention((5, 5)), random_factor((5, 5))
    psi = psi + psi.T  # both ends of a factor read it
    beliefs = ms.FactorGraph.from_attention(A, psi).run(1).beliefs
    np.testing.assert_allclose(ms.refine_with_factor(A, psi), list(beliefs.values()), rtol=0, atol=EXACT)


def test_a_factor_that_knows_nothing_of_the_sender_favours_a_label_once_per_message():
    # psi[r, k] = f[k]: all 7 messages that j hears are f
    A, f = attention((8, 8)), np.linspace(0.8, 1.2, 8)
    wanted = A * f**7
    B = ms.refine_with_factor(A, np.tile(f, (8, 1)))
    np.testing.assert_allclose(B, wanted / wanted.sum(-1, keepdims=True), rtol=0, atol=EXACT)


def test_one_factor_per_head():
    A, psi = attention((2, 3, 6, 6)), random_factor((3, 6, 6))
    B = ms.refine_with_factor(A, psi)
    for h in range(3):
        np.testing.assert_allclose(B[:, h], ms.refine_with_factor(A[:, h], psi[h]), rtol=0, atol=EXACT)


def test_padding_equals_the_sequence_alone():
    short, padded = attention((2, 5, 5), seed=1), attention((2, 8, 8), seed=2)
    padded[:, :5, :5] = short
    psi = np.full((8, 8), 1e9)  # what padded labels would say is loud
    psi[:5, :5] = random_factor((5, 5))
    valid = np.arange(8) < 5
    B = ms.refine_with_factor(padded, psi, valid=valid)
    np.testing.assert_allclose(B[:, :5, :5], ms.refine_with_factor(short, psi[:5, :5]), rtol=0, atol=EXACT)
    assert (B[:, 5:] == 0).all() and (B[:, :, 5:] == 0).all()
    _, dpsi = ms.refine_with_factor_vjp(padded, psi, attention((2, 8, 8), seed=3), valid=valid)
    assert (dpsi[5:] == 0).all() and (dpsi[:, 5:] == 0).all() and dpsi[:5, :5].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_factor_of_huge_range_survives(causal, dtype, scale):
    L = 60
    rng = np.random.default_rng(0)
    A = attention((L, L), scale=4.0).astype(dtype)
    A[7] = 0
    A[:, 3] = 0
    psi = scale * np.exp(rng.uniform(-40, 40, (L, L)))
    psi[0, 0], psi[1, 1] = psi.min(), psi.min() * np.exp(79.9)
    B = ms.refine_with_factor(A, psi, causal=causal)
    dA, dpsi = ms.refine_with_factor_vjp(A, psi, rng.standard_normal((L, L)), causal=causal)
    assert B.dtype == dA.dtype == dtype and dpsi.dtype == np.float64
    held = np.tril(A).any(-1) if causal else A.any(-1)
    np.testing.assert_allclose(B.sum(-1), held, rtol=0, atol=1e-5)  # a float32 sum of 60 terms
    P, _ = normalise_rows(A.astype(np.float64), np.tri(L, dtype=bool) if causal else None)
    in_logs, _ = refine_steps(P, _as_factor(psi / psi.max()), 1, causal=causal)
    # 60 messages, each a sum of positive terms with a rounding error of about 6e-8, or 1e-16
    np.testing.assert_allclose(B, in_logs, rtol=0, atol=5e-6 if dtype == np.float32 else EXACT)
    assert (B[A == 0] == 0).all() and np.isfinite(dA).all() and np.isfinite(dpsi).all()


def test_a_label_that_everyone_recommends_to_a_row_without_it_stays_within_float32():
    # Three messages of e^20 for key 0, which row 5 must not have, beside e^-10 for key 1, its only one: B/P is e^90.
    A = np.zeros((6, 6), np.float32)
    A[3:, 1] = 1
    psi = np.ones((6, 6))
    psi[0, 0], psi[1, :2] = np.exp(-20), np.exp([20, -10])
    B = ms.refine_with_factor(A, psi, causal=True, include_self=True)
    dA, dpsi = ms.refine_with_factor_vjp(A, psi, np.ones_like(A), causal=True, include_self=True)
    assert np.array_equal(B, A) and np.isfinite(dA).all() and np.isfinite(dpsi).all()


@pytest.mark.parametrize(("dtype", "atol"), [(np.float16, 5e-4), (np.float32, 5e-6)])
def test_short_dtypes(dtype, atol):
    # float32: messages are sums of 7 terms, multiplied 6 times, each rounded to 6e-8; float16: one rounding to 5e-4
    A, psi = attention((3, 7, 7)).astype(dtype), random_factor((7, 7)).astype(dtype)
    A.flags.writeable = psi.flags.writeable = False
    wanted = ms.refine_with_factor(A.astype(np.float64), psi.astype(np.float64))
    B = ms.refine_with_factor(A, psi)
    assert B.dtype == dtype
    np.testing.assert_allclose(B, wanted, rtol=0, atol=atol)
    dA, dpsi = ms.refine_with_factor_vjp(A, psi, wanted)
    assert dA.dtype == dpsi.dtype == dtype


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 1, 5, 5)])
def test_gradient(causal, include_self, padded, shape):
    rng = np.random.default_rng(3)
    A = attention((2, 3, 5, 5)) * rng.uniform(0.5, 2, (2, 3, 5, 1))  # general row sums
    how = {"causal": causal, "include_self": include_self}
    how["valid"] = np.array([[True] * 5, [True, True, True, False, False]])[:, None] if padded else None
    check_vjp(
        lambda A, psi: ms.refine_with_factor(A, psi, **how),
        lambda dB, A, psi: ms.refine_with_factor_vjp(A, psi, dB, **how),
        [A, 30 * random_factor(shape, range_=3.0)],
        rng,
    )


def test_gradient_along_a_constant_is_zero():
    A, psi = attention((5, 5)), random_factor((5, 5))
    for steps in (1, 2):
        _, dpsi = ms.refine_with_factor_vjp(A, psi, np.random.default_rng(0).standard_normal((5, 5)), steps=steps)
        assert abs(np.sum(psi * dpsi)) < EXACT and abs(dpsi).max() > 1e-3


BAD = {
    "psi a list": ([[1.0]], TypeError, "psi: "),
    "psi of integers": (np.ones((3, 3), int), TypeError, "psi: .*int"),
    "psi not square": (np.ones((3, 4)), ValueError, r"psi: .*\(3, 4\)"),
    "psi of another length": (np.ones((4, 4)), ValueError, r"psi: .*\(3, 3\).*\(4, 4\)"),
    "psi of one label": (np.ones((1, 1)), ValueError, r"psi: .*\(1, 1\)"),
    "psi of too many heads": (np.ones((2, 3, 3)), ValueError, r"psi: .*\(2, 3, 3\)"),
    "psi with a zero": (np.eye(3), ValueError, "psi: .*> 0"),
    "psi negative": (-np.ones((3, 3)), ValueError, "psi: .*-1.0"),
    "psi with NaN": (np.full((3, 3), np.nan), ValueError, "psi: .*nan"),
    "psi infinite": (np.full((3, 3), np.inf), ValueError, "psi: .*inf"),
    "psi out of all proportion": (np.exp(np.eye(3) * 81), ValueError, "psi: .*e.80 .*e.81"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD.keys())
def test_bad_factor_is_named(case):
    psi, error, message = BAD[case]
    with pytest.raises(error, match=message):
        ms.refine_with_factor(attention((3, 3)), psi)
    with pytest.raises(error, match=message):
        ms.refine_with_factor_vjp(attention((3, 3)), psi, np.ones((3, 3)))
    with pytest.raises(TypeError, match="dB: "):
        ms.refine_with_factor_vjp(attention((3, 3)), np.ones((3, 3)), np.eye(3, dtype=int))
