import math

import numpy as np
import pytest

from minisaobp.nn import Bert, Config
from minisaobp.training.adamw import AdamW, clip_to_norm, cosine_with_warmup
from minisaobp.training.loop import evaluate, train


def test_adamw_by_hand():
    weights, gradient = np.array([1.0, -2.0, 0.5]), np.array([0.1, -0.3, 0.2])
    wanted, m, v = weights.copy(), np.zeros(3), np.zeros(3)
    optimiser = AdamW(np.zeros(3), np.zeros(3), decayed=2, weight_decay=0.1)
    for t in range(1, 5):
        g = gradient * t
        optimiser.update(weights, g, 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        wanted[:2] -= 0.01 * 0.1 * wanted[:2]
        wanted -= 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(weights, wanted, rtol=1e-13)  # the same formula in another order of operations


def test_adamw_across_block_borders():
    n = 3 * (1 << 15) + 5
    g = np.random.default_rng(0).standard_normal(n)
    whole, tail = np.ones(n), np.ones(9)
    AdamW(np.zeros(n), np.zeros(n), decayed=n).update(whole, g, 0.1)
    AdamW(np.zeros(9), np.zeros(9), decayed=9).update(tail, g[-9:], 0.1)
    assert np.array_equal(whole[-9:], tail)


def test_clipping():
    gradient = np.array([3.0, 4.0])
    assert clip_to_norm(gradient, 1.0) == 5.0
    assert np.linalg.norm(gradient) == pytest.approx(1, rel=1e-6)  # the guard against a zero norm adds 1e-6 to it
    small = np.array([0.3, 0.4])
    clip_to_norm(small, 1.0)
    assert small.tolist() == [0.3, 0.4]


def test_schedule_rises_then_falls_and_is_never_zero():
    rates = [cosine_with_warmup(s, 100, 2.0, 10) for s in range(100)]
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[0] == pytest.approx(0.2) and 0 < rates[-1] < 0.001
    assert rates[55] == pytest.approx(1.0)  # half of the cosine
    assert [cosine_with_warmup(0, 1, 2.0, 0)] == [2.0]


def batches(rng):
    while True:
        ids = rng.integers(5, 9, (4, 1)) + np.zeros((1, 6), int)  # a sequence repeats one token: easy to fill in
        labels = np.where(np.arange(6) == 2, ids, -100)
        yield np.where(labels != -100, 4, ids), labels, np.ones((4, 6), bool)


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
def test_a_copying_task_is_learnt(variant):
    config = Config(10, 16, 1, 2, 32, 6, attention_variant=variant)
    model = Bert.initialise(config, np.random.default_rng(0))
    stream = batches(np.random.default_rng(1))
    list(train(model, stream, steps=150, peak_rate=1e-2, warmup=10))
    score = evaluate(model, [next(stream) for _ in range(8)])
    assert score.tokens == 32 and score.accuracy == 1 and score.loss < 0.1 < math.log(4)
    assert score.perplexity == math.exp(score.loss)


def test_evaluate_is_the_loss():
    model = Bert.initialise(Config(10, 16, 1, 2, 32, 6), np.random.default_rng(0))
    batch = next(batches(np.random.default_rng(1)))
    assert evaluate(model, [batch]).loss == pytest.approx(float(model.loss_and_gradients(*batch)[0]), rel=1e-6)


def test_training_repeats_to_the_last_bit():
    runs = []
    for _ in range(2):
        model = Bert.initialise(Config(10, 16, 1, 2, 32, 6, attention_variant="high"), np.random.default_rng(0))
        steps = train(model, batches(np.random.default_rng(1)), steps=20, peak_rate=1e-3, warmup=2)
        runs.append([loss for loss, _ in steps])
    assert runs[0] == runs[1]
