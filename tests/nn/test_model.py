import numpy as np
import pytest

from minisaobp.nn import PRESETS, Bert, Config, Parameters, preset
from tests.gradient_check import check_model

SIZES = {"vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}


def tiny(variant="original", dtype=np.float64, **changes):
    changes = {"pad_token_id": None} | changes  # so that token 0 is a token like any other
    config = Config(**SIZES, max_position_embeddings=7, attention_variant=variant, lam=0.4, **changes)
    model = Bert.initialise(config, np.random.default_rng(0), dtype)
    model.parameters.flat[...] += 0.3 * np.random.default_rng(1).standard_normal(model.parameters.flat.size)
    return model


IDS = np.random.default_rng(2).integers(0, 11, (3, 7))
LABELS = np.where(np.random.default_rng(3).random((3, 7)) < 0.5, IDS, -100)
MASK = (np.arange(7) < np.array([[7], [4], [6]])).astype(int)


@pytest.mark.parametrize("variant", ["original", "high", "low", "elemmul", ["high", "original"]])
def test_gradient_of_every_parameter(variant):
    # a softmax does not see what is added to all its scores: the key's bias has no gradient where nothing follows it
    unseen = ["key.bias"] if variant == "original" else []
    check_model(tiny(variant), (IDS, LABELS, MASK), np.random.default_rng(4), without_gradient=unseen)


def test_the_padding_token_is_not_trained_where_it_is_read():
    with_pad, without = (tiny(pad_token_id=pad).loss_and_gradients(IDS, LABELS)[1] for pad in (3, None))
    table = "bert.embeddings.word_embeddings.weight"
    differs = (with_pad[table] != without[table]).any(axis=1)
    assert np.flatnonzero(differs).tolist() == [3]


def test_padding_changes_nothing():
    for variant in ("original", "high", "low", "elemmul"):
        model = tiny(variant)
        alone = model.logits(IDS[1:2, :4])
        padded = model.logits(IDS, MASK)
        np.testing.assert_allclose(padded[1, :4], alone[0], rtol=1e-12)  # float64, other summation lengths


def test_maps_are_distributions_and_differ_between_variants():
    maps = {v: tiny(v).attention_maps(IDS) for v in ("original", "high", "low", "elemmul")}
    for A in maps.values():
        assert A.shape == (2, 3, 3, 7, 7)
        np.testing.assert_allclose(A.sum(-1), 1, rtol=1e-12)
    assert abs(maps["high"] - maps["original"]).max() > 0.01


def test_lam_zero_is_the_original():
    model = tiny("original")
    refined = Bert(Config(**SIZES, max_position_embeddings=7, attention_variant="high", lam=0.0), model.parameters)
    np.testing.assert_allclose(refined.logits(IDS), model.logits(IDS), rtol=1e-12)


def test_scored_are_the_labelled_logits():
    model = tiny("high")
    chosen = LABELS != -100
    scores, targets = model.scored(IDS, LABELS, MASK)
    np.testing.assert_allclose(scores, model.logits(IDS, MASK)[chosen], rtol=1e-12)
    assert np.array_equal(targets, LABELS[chosen])


def test_same_seed_same_weights():
    a, b = (Bert.initialise(Config(**SIZES), np.random.default_rng(5)).parameters.flat for _ in range(2))
    assert np.array_equal(a, b) and a.dtype == np.float32


def test_parameters_lie_side_by_side_matrices_first():
    parameters = Parameters({"a.bias": (2,), "a": (2, 3), "b": (2, 3)})
    assert list(parameters) == ["a", "b", "a.bias"] and parameters.matrices == 12
    parameters.stacked(["a", "b"])[1, 0, 0] = 7
    assert parameters["b"][0, 0] == 7 and parameters.flat[6] == 7
    assert list(parameters.under("a.")) == ["bias"]
    with pytest.raises(ValueError, match="side by side"):
        parameters.stacked(["b", "a"])
    with pytest.raises(ValueError, match="flat"):
        parameters.like(np.zeros(3))


@pytest.mark.parametrize(
    ("name", "with_pooler", "with_lm_head"),
    [
        ("bert-mini", 11_170_560, 11_201_594),
        ("bert-small", 28_763_648, 28_795_194),
        ("bert-medium", 41_373_184, 41_404_730),
    ],
)
def test_parameter_counts_of_the_paper(name, with_pooler, with_lm_head):
    assert Bert.parameter_count(preset(name, head="none")) == with_pooler
    assert Bert.parameter_count(preset(name)) == with_lm_head


def test_presets():
    for name in PRESETS:
        assert preset(name, attention_variant="high").variants == ["high"] * preset(name).num_hidden_layers
    assert preset("gpt2-medium", vocab_size=8192).vocab_size == 8192
    with pytest.raises(ValueError, match=r"preset: .*bert-mini.*'bert-huge'"):
        preset("bert-huge")


BAD_CONFIGS = {
    "num_attention_heads": {"num_attention_heads": 5},
    "attention_variant": {"attention_variant": "hi"},
    "attention_variant: expected 2": {"attention_variant": ["high"]},
    "lam": {"lam": float("nan")},
    "lam: expected 2": {"lam": [0.1, 0.2, 0.3]},
    "vocab_size": {"vocab_size": 0},
    "hidden_size": {"hidden_size": 12.0},
    "num_hidden_layers": {"num_hidden_layers": 10**30},
    "layer_norm_eps": {"layer_norm_eps": float("nan")},
    "layer_norm_eps: ": {"layer_norm_eps": "1e-5"},
    "initializer_range": {"initializer_range": None},
    "pad_token_id": {"pad_token_id": True},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configuration_is_named(message):
    with pytest.raises(ValueError, match=message):
        Config(**(SIZES | BAD_CONFIGS[message]))


def test_bad_arguments_are_named():
    model = tiny()
    for ids, message in ((IDS + 1, "0..10"), (IDS[0], r"\(B, L\)"), (IDS * 1.0, "float64"), (-IDS, "ids")):
        with pytest.raises(ValueError, match=message):
            model.logits(ids)
    with pytest.raises(ValueError, match="max_position_embeddings = 7"):
        model.logits(np.zeros((1, 8), int))
    with pytest.raises(ValueError, match="at least one label"):
        model.loss_and_gradients(IDS, np.full_like(IDS, -100))
    with pytest.raises(ValueError, match=r"labels: .*11"):
        model.loss_and_gradients(IDS, np.full_like(IDS, 11))
    with pytest.raises(ValueError, match="labels: expected the shape"):
        model.loss_and_gradients(IDS, LABELS[:2])
    with pytest.raises(ValueError, match="attention_mask"):
        model.logits(IDS, MASK[:2])
    with pytest.raises(ValueError, match="attention_mask: expected 1 for tokens and 0 for padding"):
        model.logits(IDS, np.where(MASK == 1, 0.0, -1e4))
    with pytest.raises(TypeError, match="ids: expected an array, got list"):
        model.logits(IDS.tolist())
    with pytest.raises(ValueError, match="config: expected model_type 'bert', got 'gpt2'"):
        Bert.initialise(preset("gpt2-mini", 99), np.random.default_rng(0))
    with pytest.raises(ValueError, match="dtype: expected float32 or float64, got float16"):
        Bert.initialise(model.config, np.random.default_rng(0), np.float16)


def test_learned_lambda_has_no_gradient_beyond_its_bounds():
    model = tiny("high", learn_lam="head")
    name = "bert.encoder.layer.1.attention.self.lam"
    model.parameters[name][...] = [0.3, 81.0, -90.0]
    _, gradients = model.loss_and_gradients(IDS, LABELS, MASK)
    assert gradients[name][0] != 0 and gradients[name][1:].tolist() == [0, 0]
