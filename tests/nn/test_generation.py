"""Generation with its memory against the whole text anew for every token."""

import numpy as np
import pytest

from minisaobp.nn import generation
from tests.nn.test_decoder import tiny
from tests.nn.test_model import IDS

MODELS = {
    "original": {"variant": "original"},
    "high": {"variant": "high"},
    "low": {"variant": "low"},
    "elemmul": {"variant": "elemmul"},
    "none": {"variant": "none"},
    "uniform": {"variant": "uniform"},
    "fixed": {"variant": "fixed"},
    "static": {"variant": "static"},
    "linear": {"variant": "linear"},
    "hybrid of simplifications": {"variant": ["linear", "static", "fixed"], "num_hidden_layers": 3},
    "hybrid with learned lambda": {"variant": ["high", "original"], "learn_lam": "head"},
}


def model_of(name, **changes):
    return tiny(**MODELS[name], **{"max_position_embeddings": 40} | changes)


@pytest.mark.parametrize("name", MODELS)
def test_every_score_is_that_of_the_whole_text(name, monkeypatch):
    model, seen = model_of(name), []
    choose = generation._choose
    monkeypatch.setattr(generation, "_choose", lambda scores, *x: (seen.append(scores), choose(scores, *x))[1])
    drawn = list(model.generate(IDS, 30, temperature=1.5, rng=np.random.default_rng(0)))
    text = np.concatenate([IDS, np.array(drawn).T], axis=1)
    wanted = model.logits(text)[:, 6:-1]
    # float64; sums of up to 37 terms in another order
    np.testing.assert_allclose(np.stack(seen, 1), wanted, rtol=0, atol=1e-11)


def test_greedy_takes_the_likeliest():
    model = model_of("high")
    text = IDS
    for token in model.generate(IDS, 5):
        assert np.array_equal(token, model.logits(text)[:, -1].argmax(-1))
        text = np.concatenate([text, token[:, None]], axis=1)
    assert text.shape == (3, 12)


def test_top_k_and_temperature_by_their_frequencies():
    scores = np.tile(np.log([0.5, 0.1, 0.3, 0.1]), (40000, 1))
    draw = lambda *x: np.bincount(generation._choose(scores, *x, np.random.default_rng(1)), minlength=4) / 40000  # noqa: E731
    # standard deviation of a share: at most 0.0025
    np.testing.assert_allclose(draw(1.0, None), [0.5, 0.1, 0.3, 0.1], atol=0.012)
    np.testing.assert_allclose(draw(1.0, 2), [0.625, 0, 0.375, 0], atol=0.012)
    np.testing.assert_allclose(draw(0.5, None), np.array([25, 1, 9, 1]) / 36, atol=0.012)
    assert draw(1.0, 1).tolist() == [1, 0, 0, 0]


def test_a_temperature_near_zero_is_greedy():
    scores = np.array([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]])
    assert generation._choose(scores, 1e-310, None, np.random.default_rng(0)).tolist() == [1, 0]


def test_the_same_seed_draws_the_same_text():
    first, again, other = (
        np.array(list(model_of("high").generate(IDS, 20, 1.0, 5, np.random.default_rng(seed)))) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 34}, "tokens: expected at most 33 after a prompt of 7"),
        ({"temperature": -1.0}, "temperature: expected a number >= 0"),
        ({"temperature": 1.0}, "rng: expected a generator"),
        ({"top_k": 0}, "top_k: expected a whole number >= 1"),
        ({"top_k": 2.5}, "top_k: expected a whole number >= 1"),
        ({"tokens": -3}, "tokens: expected a whole number >= 1"),
        ({"temperature": "1"}, "temperature: expected a number"),
        ({"ids": IDS + 1}, r"ids: expected 0\.\.10"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_generated(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of("original").generate(**{"ids": IDS, "tokens": 3} | arguments)
