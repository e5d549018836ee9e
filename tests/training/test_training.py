import math

import numpy as np
import pytest

from minisaobp.nn import Bert, Config
from minisaobp.text.batches import Batch
from minisaobp.training.adamw import AdamW, clip_to_norm, cosine_with_warmup
from minisaobp.training.loop import Settings, evaluate, optimiser_for, train


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


class Copying:
    """Sequences that repeat one token, with one place to fill in."""

    def batch(self, number, size):
        ids = np.random.default_rng([1, number]).integers(5, 9, (size, 1)) + np.zeros((1, 6), int)
        labels = np.where(np.arange(6) == 2, ids, -100)
        return Batch(np.where(labels != -100, 4, ids), labels, np.ones((size, 6), bool))


def model_of(variant="original", dtype=np.float32, **changes):
    config = Config(10, 16, 1, 2, 32, 6, attention_variant=variant, **{"hidden_dropout_prob": 0.0} | changes)
    return Bert.initialise(config, np.random.default_rng(0), dtype)


def trained(model, steps, **changes):
    settings = Settings(**{"steps": steps, "batch": 4, "peak_rate": 1e-2, "warmup": 10} | changes)
    return [loss for loss, _ in train(model, Copying(), settings, optimiser_for(model, settings))]


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul"])
def test_a_copying_task_is_learnt(variant):
    model = model_of(variant, attention_probs_dropout_prob=0.0)
    trained(model, 300, batch=8)
    score = evaluate(model, [Copying().batch(1000 + n, 4) for n in range(8)])
    assert score.labels == 32 and score.accuracy == 1 and score.loss < 0.1 < math.log(4)
    assert score.perplexity == math.exp(score.loss)


def test_evaluate_is_the_loss():
    model, batch = model_of(), Copying().batch(0, 4)
    assert evaluate(model, [batch]).loss == pytest.approx(float(model.loss_and_gradients(*batch)[0]), rel=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        evaluate(model, [])


def test_a_regression_is_trained_and_has_no_accuracy():
    class Sums:
        def batch(self, number, size):
            ids = np.random.default_rng([2, number]).integers(0, 10, (size, 6))
            return Batch(ids, (ids == 3).sum(1) / 2.0)

    model = model_of(head="regression", num_labels=1)
    settings = Settings(steps=200, batch=16, peak_rate=1e-2, warmup=10)
    held_out = [Sums().batch(10**6, 64)]
    before = evaluate(model, held_out)
    list(train(model, Sums(), settings, optimiser_for(model, settings)))
    after = evaluate(model, held_out)
    assert after.accuracy is None and after.labels == 64 and after.loss < 0.3 * before.loss


def test_a_learned_lambda_moves():
    model = model_of("high", learn_lam="head")
    name = "bert.encoder.layer.0.attention.self.lam"
    assert (model.parameters[name] == np.float32(0.2)).all()
    trained(model, 30)
    assert model.parameters[name].shape == (2,) and len(set(model.parameters[name].tolist())) == 2


def test_training_repeats_to_the_last_bit():
    runs = [trained(model_of("high", hidden_dropout_prob=0.1), 20) for _ in range(2)]
    assert runs[0] == runs[1]
    assert trained(model_of("high", hidden_dropout_prob=0.1), 20, seed=1) != runs[0]


def test_accumulated_batches_are_one_large_batch():
    class Uneven(Copying):  # every batch with another number of labels: means of means would differ
        def batch(self, number, size):
            ids, _, mask, _ = super().batch(number, size)
            return Batch(ids, np.where(np.arange(6) <= number % 3 + 2, ids, -100), mask)

    class AllAtOnce(Uneven):
        def batch(self, number, size):
            parts = [super(AllAtOnce, self).batch(3 * number + n, size // 3) for n in range(3)]
            return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True) if arrays[0] is not None))

    losses, weights = [], []
    for batches, changes in ((Uneven(), {"batch": 4, "accumulate": 3}), (AllAtOnce(), {"batch": 12})):
        model = model_of("high", np.float64, attention_probs_dropout_prob=0.0)
        # without steps of unit length along gradients that are only rounding: eps beside the root of the square
        settings = Settings(steps=4, peak_rate=1e-2, warmup=1, **changes)
        optimiser = optimiser_for(model, settings)
        optimiser.eps = 1e-3
        losses.append([loss for loss, _ in train(model, batches, settings, optimiser)])
        weights.append(model.parameters.flat)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)
    np.testing.assert_allclose(weights[0], weights[1], rtol=0, atol=1e-12)
