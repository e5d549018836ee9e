import numpy as np
import pytest
from scipy import stats

from minisaobp.text.scores import accuracy, f1, matthews, pearson, spearman


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 11, 60) / 2  # many equal values, as STS-B has
    predictions = labels + rng.standard_normal(60) if seed else rng.integers(0, 3, 60).astype(float)
    # both are sums of 60 products in double precision
    assert pearson(labels, predictions) == pytest.approx(stats.pearsonr(labels, predictions).statistic, abs=1e-13)
    assert spearman(labels, predictions) == pytest.approx(stats.spearmanr(labels, predictions).statistic, abs=1e-13)


def test_what_is_not_defined_is_zero():
    assert pearson([1, 1, 1], [1, 2, 3]) == spearman([1, 2, 3], [2, 2, 2]) == 0
    assert matthews([0, 1, 0], [1, 1, 1]) == matthews([1, 1], [1, 1]) == 0
    assert f1([0, 0, 1], [0, 0, 0]) == f1([0, 0], [0, 0]) == 0
    assert matthews([0, 1, 0, 1], [1, 0, 1, 0]) == -1 and accuracy([1, 0], [1, 1]) == 0.5


def test_another_number_of_predictions_is_refused():
    with pytest.raises(ValueError, match=r"predictions: expected the shape of labels, \(N,\), got \(2,\) for labels"):
        accuracy([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="predictions"):
        f1([], [])
