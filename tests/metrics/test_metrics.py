import numpy as np
import pytest

import minisaobp as ms
from tests.bp.test_refinement import attention

L = 16
SINK = np.eye(L)[np.zeros(L, int)]
SHIFT = np.roll(np.eye(L), 1, axis=1)
UNIFORM = np.full((L, L), 1 / L)
HALF = np.zeros((L, L))  # half of the rows look at a sink, the other half spread over them, the sink apart
HALF[: L // 2, 0] = 1
HALF[L // 2 :, 1 : L // 2] = 1 / (L // 2 - 1)
SEVERAL = attention((2, 3, 5, 5))


@pytest.mark.parametrize(
    ("A", "gtd", "indirect_entropy"),
    [(np.eye(L), 0.85608862, 0), (UNIFORM, 0.85608862, np.log(L)), (SINK, 0.85608862, 0), (SHIFT, 0.66639323, None)],
    ids=["identity", "uniform", "sink", "shift"],
)
def test_known_answers(A, gtd, indirect_entropy):
    assert ms.gtd(A) == pytest.approx(gtd, abs=1e-8)  # eight digits are quoted
    if indirect_entropy is not None:
        assert ms.indirect_entropy(A) == pytest.approx(indirect_entropy, abs=1e-12)


def test_every_idempotent_has_the_same_gtd():
    assert ms.gtd(np.eye(3)) == pytest.approx(2.439**2 / (1 + 2.439**2), rel=1e-12)


def test_gtd_can_exceed_that_of_a_collapse():
    assert ms.gtd(HALF) == pytest.approx(0.912, abs=5e-4)


def test_gtd_by_its_definition_in_loops():
    for A in SEVERAL.reshape(-1, 5, 5):
        G = np.zeros((5, 5))
        for t in range(2, 6):
            power = np.eye(5)
            for _ in range(t):
                power = np.array([[sum(power[i, k] * A[k, j] for k in range(5)) for j in range(5)] for i in range(5)])
            G += 0.7 ** (t - 1) * power
        np.testing.assert_allclose(ms.indirect_attention(A, 0.7, 5), G, rtol=1e-12)
        square = sum(g * g for g in G.ravel())
        assert ms.gtd(A, 0.7, 5) == pytest.approx(square / (square + sum(a * a for a in A.ravel())), rel=1e-12)


def test_entropy():
    np.testing.assert_allclose(ms.attention_entropy(np.stack([np.eye(L), UNIFORM, SINK])), [0, np.log(L), 0])
    assert ms.attention_entropy(SEVERAL).shape == (2, 3)


@pytest.mark.parametrize("measure", [ms.attention_entropy, ms.gtd, ms.indirect_entropy])
def test_padding_and_permutation_change_nothing(measure):
    padded = attention((2, 3, 8, 8), seed=1)
    padded[..., :5, :] = 0
    padded[..., :5, :5] = SEVERAL  # rows of padded queries hold what a softmax left there
    alone = measure(SEVERAL)
    np.testing.assert_allclose(measure(padded, valid=np.arange(8) < 5), alone, rtol=1e-12)
    order = np.random.default_rng(0).permutation(5)
    np.testing.assert_allclose(measure(SEVERAL[..., order, :][..., order]), alone, rtol=1e-12)


def test_dtypes():
    for dtype in (np.float16, np.float32, np.float64):
        A = SEVERAL.astype(dtype)
        assert ms.indirect_attention(A).dtype == dtype
        np.testing.assert_allclose(ms.gtd(A), ms.gtd(SEVERAL), rtol=5e-3 if dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("measure", [ms.attention_entropy, ms.gtd, ms.indirect_entropy, ms.indirect_attention])
def test_bad_input_is_named(measure):
    for A in (np.ones((2, 3)), -np.eye(3), np.eye(3, dtype=int), np.full((3, 3), np.nan), "A"):
        with pytest.raises((ValueError, TypeError), match="A: "):
            measure(A)
    with pytest.raises(ValueError, match="valid: "):
        measure(np.eye(3), valid=np.ones(2, bool))


@pytest.mark.parametrize("options", [{"beta": 0}, {"beta": np.nan}, {"hops": 1}, {"hops": 2.5}])
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ms.gtd(np.eye(3), **options)
