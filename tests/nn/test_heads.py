"""Every head: its gradients, its loss by hand, what it refuses."""

import numpy as np
import pytest

from minisaobp import from_pretrained
from minisaobp.nn import Bert, Config
from tests.gradient_check import check_model
from tests.nn.test_model import IDS, MASK, SIZES

R = np.random.default_rng(6)
TYPES = (np.arange(7) > np.array([[3], [2], [4]])).astype(int)
CHOICES = R.integers(0, 11, (2, 4, 7))
BATCHES = {
    "classification": (IDS, np.array([2, 0, 1]), MASK, TYPES),
    "regression": (IDS, R.standard_normal((3, 3)), MASK, TYPES),
    "multiple_choice": (CHOICES, np.array([3, 1]), (np.arange(7) < R.integers(4, 8, (2, 4, 1))).astype(int)),
    "span": (IDS, np.array([[0, 5], [2, 2], [4, 1]]), MASK, TYPES),
    "lm": (IDS, np.where(R.random((3, 7)) < 0.5, IDS, -100), MASK, TYPES),
}


def tiny(head, **changes):
    num_labels = 3 if head in ("classification", "regression") else 2  # the others have no classes
    changes = {"pad_token_id": None, "head": head, "num_labels": num_labels, "lam": 0.4} | changes
    model = Bert.initialise(Config(**SIZES | {"max_position_embeddings": 7} | changes), R, np.float64)
    model.parameters.flat[...] += 0.3 * np.random.default_rng(1).standard_normal(model.parameters.flat.size)
    return model


@pytest.mark.parametrize("regulariser", ["entropy", "eigen"])
@pytest.mark.parametrize("head", BATCHES)
def test_a_regulariser_adds_to_the_loss_of_every_head(head, regulariser):
    model = tiny(head, regulariser=regulariser, regulariser_strength=0.5)
    unseen = ["key.bias", *{"multiple_choice": ["classifier.bias"], "span": ["qa_outputs.bias"]}.get(head, [])]
    check_model(model, BATCHES[head], np.random.default_rng(0), without_gradient=unseen)


@pytest.mark.parametrize("head", BATCHES)
@pytest.mark.parametrize("learn_lam", [None, "layer", "head"])
def test_gradient_of_every_parameter(head, learn_lam):
    refined = {"attention_variant": ["high", "low"], "learn_lam": learn_lam}
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = tiny(head, **(dropout | refined if learn_lam else dropout))
    unseen = [] if learn_lam else ["key.bias"]  # a softmax does not see what is added to all its scores
    if head in ("multiple_choice", "span"):
        unseen.append("qa_outputs.bias" if head == "span" else "classifier.bias")  # nor does the loss's own
    check_model(model, BATCHES[head], np.random.default_rng(4), unseen, dropout_seed=5 if learn_lam else None)


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_shapes_of_the_logits():
    shapes = {head: tiny(head).logits(batch[0], *batch[2:]).shape for head, batch in BATCHES.items()}
    assert shapes.pop("lm") == (3, 7, 11) and shapes.pop("multiple_choice") == (2, 4)
    assert shapes == {"classification": (3, 3), "regression": (3, 3), "span": (3, 2, 7)}


def test_loss_of_a_span_is_the_mean_of_start_and_end():
    ids, labels, *others = BATCHES["span"]
    model = tiny("span")
    scores = log_softmax(model.logits(ids, *others))
    wanted = -np.mean([scores[b, side, labels[b, side]] for b in range(3) for side in (0, 1)])
    assert model.loss_and_gradients(ids, labels, *others)[0] == pytest.approx(wanted, rel=1e-12)


def test_loss_of_a_choice():
    ids, labels, *others = BATCHES["multiple_choice"]
    model = tiny("multiple_choice")
    scores = log_softmax(model.logits(ids, *others))
    assert model.loss_and_gradients(ids, labels, *others)[0] == pytest.approx(-scores[[0, 1], labels].mean(), rel=1e-12)


def test_loss_of_a_regression():
    ids, labels, *others = BATCHES["regression"]
    model = tiny("regression")
    wanted = np.mean((model.logits(ids, *others) - labels) ** 2)
    assert model.loss_and_gradients(ids, labels, *others)[0] == pytest.approx(wanted, rel=1e-12)
    single = tiny("regression", num_labels=1)
    flat, column = (single.loss_and_gradients(ids, y, *others)[0] for y in (labels[:, 0], labels[:, :1]))
    assert flat == column


def test_token_types_matter_and_default_to_zero():
    model = tiny("classification")
    assert np.array_equal(model.logits(IDS, MASK), model.logits(IDS, MASK, np.zeros_like(IDS)))
    assert abs(model.logits(IDS, MASK) - model.logits(IDS, MASK, TYPES)).max() > 1e-3


@pytest.mark.parametrize("head", [*BATCHES, "none"])
def test_round_trip(head, tmp_path):
    model = tiny(head, attention_variant="high", learn_lam="head")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == model.config
    assert np.array_equal(again.parameters.flat, model.parameters.flat)


def test_with_head_keeps_the_encoder_and_draws_the_rest():
    model = tiny("lm")
    tuned = model.with_head("classification", np.random.default_rng(0), num_labels=4)
    shared = set(model.parameters) & set(tuned.parameters)
    assert shared == {name for name in model.parameters if name.startswith("bert.")}
    assert all(np.array_equal(model.parameters[name], tuned.parameters[name]) for name in shared)
    assert tuned.parameters["classifier.weight"].shape == (4, 12) and tuned.parameters["classifier.weight"].any()
    tuned.parameters.flat[...] = 0
    assert model.parameters["bert.embeddings.word_embeddings.weight"].any()  # nothing is shared


def test_dropout_only_with_a_generator():
    model = tiny("classification", hidden_dropout_prob=0.5)
    batch = BATCHES["classification"]
    assert model.loss_and_gradients(*batch)[0] == model.loss_and_gradients(*batch)[0]
    drawn = {model.loss_and_gradients(*batch, rng=np.random.default_rng(seed))[0] for seed in (0, 0, 1)}
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("classification", np.array([0, 3, 1]), r"labels: expected 0..2, got 0..3"),
        ("classification", np.array([0, -1, 1]), r"labels: expected 0..2, got -1..1"),
        ("classification", np.array([0, 1]), r"labels: expected the shape \(3,\)"),
        ("classification", np.array([0.0, 1, 1]), r"labels: expected integers, got float64"),
        ("regression", np.zeros((3, 2)), r"labels: expected the shape \(3, 3\)"),
        ("regression", np.full((3, 3), np.nan), r"labels: expected finite"),
        ("span", np.array([[0, 7], [0, 1], [1, 2]]), r"labels: expected 0..6, got 0..7"),
        ("none", np.zeros(3, int), "no head"),
    ],
)
def test_bad_labels_are_named(head, labels, message):
    with pytest.raises(ValueError, match=message):
        tiny(head).loss_and_gradients(IDS, labels, MASK)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"labels: expected 0..3, got 1..4"):
        tiny("multiple_choice").loss_and_gradients(CHOICES, np.array([4, 1]))
    with pytest.raises(ValueError, match=r"ids: expected integers of shape \(B, C, L\)"):
        tiny("multiple_choice").logits(IDS)
    with pytest.raises(ValueError, match=r"token_type_ids: expected integers 0..1, got 0..2"):
        tiny("lm").logits(IDS, MASK, TYPES * 2)
    with pytest.raises(ValueError, match="token_type_ids: expected the shape of ids"):
        tiny("lm").logits(IDS, MASK, TYPES[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "pairs"}, "head: expected one of lm, none"),
        ({"head": "span", "model_type": "gpt2"}, "head: expected one of lm for gpt2"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob: expected a number from 0 to below 1, got 1.0"),
        ({"learn_lam": "token"}, "learn_lam: expected null, layer or head, got 'token'"),
        ({"learn_lam": "head"}, "learn_lam: expected a layer of variant high or low, got 'original'"),
    ],
)
def test_bad_configuration_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**SIZES | changes)
