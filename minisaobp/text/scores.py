"""The official metrics of the tasks, each a number from predictions and labels, higher is better."""

import numpy as np


def accuracy(labels, predictions):
    """Share of predictions that are the label.

    >>> accuracy([0, 1, 1, 0], [0, 1, 0, 0])
    0.75
    """
    labels, predictions = _alike(labels, predictions)
    return float((labels == predictions).mean())


def f1(labels, predictions):
    """Harmonic mean of precision and recall of the class 1, 2 TP / (2 TP + FP + FN); 0 if there is none of it.

    >>> f1([0, 1, 1, 0], [0, 1, 0, 0])
    0.6666666666666666
    """
    labels, predictions = _alike(labels, predictions)
    said, true = predictions == 1, labels == 1
    found = int((said & true).sum())
    return 2 * found / (int(said.sum()) + int(true.sum())) if found else 0.0


def matthews(labels, predictions):
    """Matthews' correlation of any number of classes: Pearson's r of the two as indicators; 0 if one is constant.

    >>> matthews([0, 1, 1, 0], [0, 1, 0, 0])
    0.5773502691896258
    """
    labels, predictions = _alike(labels, predictions)
    classes = np.union1d(labels, predictions)
    true, said = labels[:, None] == classes, predictions[:, None] == classes  # [N, classes]
    t, p, both = true.mean(axis=0), said.mean(axis=0), (true & said).any(axis=1).mean()
    spread = np.sqrt((1 - t @ t) * (1 - p @ p))
    return float((both - t @ p) / spread) if spread > 0 else 0.0


def pearson(labels, predictions):
    """Pearson's r; 0 if one of the two is constant.

    >>> round(pearson([1, 2, 4], [1, 3, 4]), 4)
    0.9286
    """
    labels, predictions = (x - x.mean() for x in _alike(labels, predictions, float))
    length = np.sqrt((labels @ labels) * (predictions @ predictions))
    return float(labels @ predictions / length) if length > 0 else 0.0


def spearman(labels, predictions):
    """Spearman's rank correlation: Pearson's r of the ranks, equal values sharing the mean of theirs.

    >>> spearman([1, 2, 4], [10, 30, 31])
    1.0
    """
    return pearson(*(_ranks(x) for x in _alike(labels, predictions, float)))


def _ranks(x):
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _alike(labels, predictions, dtype=None):
    labels, predictions = np.asarray(labels, dtype), np.asarray(predictions, dtype)
    if labels.ndim != 1 or labels.shape != predictions.shape or not labels.size:
        raise ValueError(
            f"predictions: expected the shape of labels, (N,), got {predictions.shape} for labels {labels.shape}"
        )
    return labels, predictions
