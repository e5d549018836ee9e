import numpy as np
import pytest

from minisaobp.text.scores import accuracy, f1, matthews

peer = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_scores_are_scikit_learns(seed, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 50)
    predictions = np.where(rng.random(50) < 0.4, labels, rng.integers(0, classes, 50))
    # sums of 50 whole numbers: only the last division rounds
    assert matthews(labels, predictions) == pytest.approx(peer.matthews_corrcoef(labels, predictions), abs=1e-14)
    assert accuracy(labels, predictions) == pytest.approx(peer.accuracy_score(labels, predictions), abs=1e-15)
    if classes == 2:
        assert f1(labels, predictions) == pytest.approx(peer.f1_score(labels, predictions), abs=1e-15)
