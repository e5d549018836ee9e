"""Sparsity, where attention goes, kinds of heads; GTD's limit, gradient and form across layers."""

import math

import numpy as np
import pytest

import minisaobp as ms
from minisaobp import metrics
from tests.bp.test_refinement import attention
from tests.gradient_check import check_vjp
from tests.metrics.test_metrics import HALF, SEVERAL, SHIFT, SINK, UNIFORM, L

KNOWN = {"identity": np.eye(L), "uniform": UNIFORM, "sink": SINK, "shift": SHIFT}
BAND = np.where(abs(np.arange(L)[:, None] - np.arange(L)) <= 2, 1.0, 0)
BAND /= BAND.sum(-1, keepdims=True)


@pytest.mark.parametrize("name", KNOWN)
def test_infinitely_many_hops_are_the_limit(name):
    A = KNOWN[name]
    # beta^300 = 2e-14
    np.testing.assert_allclose(
        ms.indirect_attention(A, hops=math.inf), ms.indirect_attention(A, hops=300), rtol=1e-9, atol=1e-12
    )


def test_the_limit_needs_a_beta_below_one():
    with pytest.raises(ValueError, match=r"beta: with hops=inf expected .* below 1, got 1"):
        ms.gtd(UNIFORM, 1.0, math.inf)
    assert ms.gtd(UNIFORM, 1.0, 9) > 0.9
    with pytest.raises(ValueError, match=r"hops: expected a whole number >= 2 or math\.inf"):
        ms.gtd(UNIFORM, hops=2.5)


@pytest.mark.parametrize("hops", [2, 3, 4, 7, math.inf])
@pytest.mark.parametrize("valid", [None, np.arange(5) < np.array([[5], [3], [4]])], ids=["whole", "padded"])
def test_gradient_of_gtd(hops, valid):
    A = 0.9 * SEVERAL  # also where rows do not sum to 1
    check_vjp(
        lambda A: ms.gtd(A, 0.8, hops, valid=valid),
        lambda dgtd, A: (ms.gtd_backward(dgtd, A, 0.8, hops, valid=valid),),
        [A],
        np.random.default_rng(0),
    )


def test_gradient_of_gtd_of_nothing_is_zero():
    assert not ms.gtd_backward(1.0, np.zeros((3, 3))).any() and np.isnan(ms.gtd(np.zeros((3, 3))))
    assert ms.gtd_backward(1.0, np.eye(3, dtype=np.float32)).dtype == np.float32


def test_across_layers_by_the_definition():
    maps = attention((5, 2, 6, 6))
    result = ms.cross_layer_gtd(maps, 0.7, 3)
    assert result.shape == (5, 2) and (result[0] == 0).all()
    for n in range(1, 5):
        for b in range(2):
            G = 0.7 * maps[n, b] @ maps[n - 1, b]
            if n > 1:
                G = G + 0.49 * maps[n, b] @ maps[n - 1, b] @ maps[n - 2, b]
            wanted = (G**2).sum() / ((G**2).sum() + (maps[n, b] ** 2).sum())
            assert result[n, b] == pytest.approx(wanted, rel=1e-12)


def test_the_same_attention_in_every_layer_is_the_single_layer_measure():
    maps = np.stack([HALF] * 6)
    expected = [0] + [ms.gtd(HALF, hops=min(4, n)) for n in range(2, 7)]
    np.testing.assert_allclose(ms.cross_layer_gtd(maps), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="maps: expected shape"):
        ms.cross_layer_gtd(HALF)


def test_sparsity_counts_only_what_could_be_attended_to():
    assert ms.sparsity(np.eye(L)) == 1 - 1 / L and ms.sparsity(UNIFORM) == 0 and ms.sparsity(UNIFORM, 0.1) == 1
    causal = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    assert ms.sparsity(causal) == 6 / 16 and ms.sparsity(causal, causal=True) == 0
    padded = np.zeros((8, 8))
    padded[:4, :4] = np.eye(4)
    assert ms.sparsity(padded, valid=np.arange(8) < 4) == 0.75
    with pytest.raises(ValueError, match="threshold: expected a finite number > 0"):
        ms.sparsity(UNIFORM, 0)


def test_column_mass():
    np.testing.assert_allclose(metrics.column_mass(SINK), np.eye(L)[0])
    padded = np.zeros((2, 3, 8, 8))
    padded[..., :5, :5] = SEVERAL
    padded[..., 5:, 0] = 1
    masses = metrics.column_mass(padded, valid=np.arange(8) < 5)
    np.testing.assert_allclose(masses[..., :5], metrics.column_mass(SEVERAL), rtol=1e-12)
    np.testing.assert_allclose(masses.sum(-1), 1, rtol=1e-12)


def test_regimes_tell_apart_what_gtd_does_not():
    matrices = np.stack([np.eye(L), UNIFORM, SINK, BAND, SHIFT])
    assert metrics.regime(metrics.head_features(matrices)).tolist() == ["local", "diffuse", "sink", "local", "local"]
    causal = np.tril(np.ones((L, L))) / np.arange(1, L + 1)[:, None]
    assert metrics.regime(metrics.head_features(causal, causal=True)) == "diffuse"
    far = np.roll(np.eye(L), 5, axis=1)
    assert metrics.regime(metrics.head_features(far)) == "mixed"


@pytest.mark.parametrize("feature", ["sink", "entropy", "local"])
def test_features_know_padding(feature):
    padded = attention((2, 3, 8, 8), seed=1)
    padded[..., :5, :] = 0
    padded[..., :5, :5] = SEVERAL
    alone = metrics.head_features(SEVERAL)[feature]
    np.testing.assert_allclose(metrics.head_features(padded, valid=np.arange(8) < 5)[feature], alone, rtol=1e-12)
