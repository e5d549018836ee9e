import itertools

import numpy as np
import pytest

from minisaobp.bp.refinement import VARIANTS
from minisaobp.nn import PRESETS, Bert, Config, Parameters, preset
from minisaobp.nn.config import MIXINGS
from minisaobp.nn.regularisers import entropy_penalty
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


HYBRIDS = [["high", "original"], ["uniform", "static"], ["fixed", "high"], ["linear", "none"]]


@pytest.mark.parametrize("variant", [*VARIANTS, *MIXINGS, *HYBRIDS])
def test_gradient_of_every_parameter(variant):
    # a softmax does not see what is added to all its scores: the key's bias has no gradient where nothing follows it
    layers = enumerate(tiny(variant).config.variants)
    unseen = [f"{n}.attention.self.key.bias" for n, kind in layers if kind in ("original", "static")]
    check_model(tiny(variant), (IDS, LABELS, MASK), np.random.default_rng(4), without_gradient=unseen)


@pytest.mark.parametrize("regulariser", ["entropy", "eigen"])
@pytest.mark.parametrize("variant", ["original", ["high", "uniform"], ["static", "fixed"]])
def test_gradient_of_every_parameter_under_a_regulariser(variant, regulariser):
    model = tiny(variant, regulariser=regulariser, regulariser_strength=0.7)
    unseen = [
        f"{n}.attention.self.key.bias" for n, v in enumerate(model.config.variants) if v in ("original", "static")
    ]
    check_model(model, (IDS, LABELS, MASK), np.random.default_rng(4), without_gradient=unseen)
    theta = [name for name in model.parameters if name.endswith("theta")]
    assert len(theta) == {"entropy": len(model.config.regularised), "eigen": 0}[regulariser]


@pytest.mark.parametrize("regulariser", ["entropy", "eigen"])
def test_a_regulariser_adds_its_penalty_to_the_loss_and_changes_nothing_else(regulariser):
    plain = tiny("high")
    model = tiny("high", regulariser=regulariser, regulariser_strength=0.3)
    for name, view in plain.parameters.items():
        model.parameters[name][...] = view
    assert np.array_equal(model.logits(IDS, MASK), plain.logits(IDS, MASK))
    losses = [m.loss_and_gradients(IDS, LABELS, MASK)[0] for m in (plain, model)]
    if regulariser == "entropy":
        theta = [model.parameters[f"bert.encoder.layer.{n}.attention.self.theta"] for n in range(2)]
        maps = zip(plain.attention_maps(IDS, MASK), theta, strict=True)
        wanted = [entropy_penalty(A, t, MASK == 1)[0] for A, t in maps]
    else:
        wanted = []
        for n, h in itertools.product(range(2), range(3)):
            name = f"bert.encoder.layer.{n}.attention.self."
            Wq, Wk = (plain.parameters[f"{name}{kind}.weight"][4 * h : 4 * h + 4] for kind in ("query", "key"))
            W = Wq.T @ Wk
            wanted.append((np.linalg.svd(W)[1] ** 2).sum() - np.linalg.eigvals(W).sum().real ** 2 / 4)
    assert losses[1] - losses[0] == pytest.approx(0.3 * np.mean(wanted), rel=1e-9)


def test_static_attention_is_the_original_in_the_first_layer():
    for regulariser in ({}, {"regulariser": "eigen", "regulariser_strength": 1.0}):
        models = [tiny([first, "high"], **regulariser) for first in ("original", "static")]
        assert np.allclose(models[0].logits(IDS, MASK), models[1].logits(IDS, MASK), rtol=1e-13)
        (_, a), (_, b) = (model.loss_and_gradients(IDS, LABELS, MASK) for model in models)
        np.testing.assert_allclose(a.flat, b.flat, rtol=0, atol=1e-12)  # float64, sums in another order


def test_layers_without_queries_have_no_query_and_key():
    counts = {v: Bert.parameter_count(Config(**SIZES, max_position_embeddings=7, attention_variant=[v, "original"]))
              for v in ("original", "none", "uniform", "fixed", "static", "linear")}  # fmt: skip
    less = 2 * (12 * 12 + 12)
    assert counts["original"] == counts["static"] == counts["linear"]
    assert counts["none"] == counts["uniform"] == counts["original"] - less
    assert counts["fixed"] == counts["original"] - less + 3 * 7 * 7


def test_the_padding_token_is_not_trained_where_it_is_read():
    with_pad, without = (tiny(pad_token_id=pad).loss_and_gradients(IDS, LABELS)[1] for pad in (3, None))
    table = "bert.embeddings.word_embeddings.weight"
    differs = (with_pad[table] != without[table]).any(axis=1)
    assert np.flatnonzero(differs).tolist() == [3]


def test_padding_changes_nothing():
    for variant in VARIANTS + MIXINGS:
        model = tiny(variant)
        alone = model.logits(IDS[1:2, :4])
        padded = model.logits(IDS, MASK)
        np.testing.assert_allclose(padded[1, :4], alone[0], rtol=1e-12)  # float64, other summation lengths


def test_maps_are_distributions_and_differ_between_variants():
    maps = {v: tiny(v).attention_maps(IDS) for v in VARIANTS + MIXINGS}
    for A in maps.values():
        assert A.shape == (2, 3, 3, 7, 7)
        np.testing.assert_allclose(A.sum(-1), 1, rtol=1e-12)
    assert abs(maps["high"] - maps["original"]).max() > 0.01
    assert (maps["none"] == np.eye(7)).all()
    np.testing.assert_allclose(maps["uniform"], 1 / 7, rtol=1e-15)
    assert (maps["fixed"] == maps["fixed"][:, :1]).all() and abs(maps["static"][1] - maps["original"][1]).max() > 0.01


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
    "regulariser: expected null, entropy or eigen": {"regulariser": "entropie"},
    "regulariser: expected a layer that it can change": {
        "regulariser": "eigen",
        "regulariser_strength": 1.0,
        "attention_variant": ["fixed", "none"],
    },
    "regulariser_strength: expected a finite number above 0": {"regulariser": "eigen"},
    "regulariser_strength: expected 0 without": {"regulariser_strength": 1.0},
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
