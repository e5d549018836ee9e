import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minisaobp import from_pretrained
from tests.nn.test_model import IDS, MASK, tiny


@pytest.fixture
def saved(tmp_path):
    tiny(["high", "original"]).save_pretrained(tmp_path / "new" / "model")
    return tmp_path / "new" / "model"


def test_round_trip_to_the_last_bit(saved):
    model, again = tiny(["high", "original"]), from_pretrained(saved)
    assert again.config == model.config and again.parameters.flat.dtype == np.float64
    assert np.array_equal(again.parameters.flat, model.parameters.flat)
    assert np.array_equal(again.logits(IDS, MASK), model.logits(IDS, MASK))
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def rewrite(saved, change):
    tensors = load_file(saved / "model.safetensors")
    change(tensors)
    save_file(tensors, saved / "model.safetensors")


def test_bad_weights_are_named(saved):
    name = "bert.encoder.layer.1.output.dense.bias"
    rewrite(saved, lambda tensors: tensors.update({name: np.zeros(5)}))
    with pytest.raises(ValueError, match=rf"{name} has shape \(5,\), config.json asks for \(12,\)"):
        from_pretrained(saved)
    rewrite(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        from_pretrained(saved)
    rewrite(saved, lambda tensors: tensors.update({name: np.zeros(12, int)}))
    with pytest.raises(ValueError, match=f"{name} is int64"):
        from_pretrained(saved)


def test_a_decoder_that_is_not_tied_is_refused(saved):
    rewrite(saved, lambda tensors: tensors.update({"cls.predictions.decoder.weight": np.zeros((11, 12))}))
    with pytest.raises(ValueError, match="only tied weights"):
        from_pretrained(saved)


def test_damaged_files_are_named(saved, tmp_path):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read as JSON"):
        from_pretrained(saved)
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "relu"), ("model_type", "t5"), ("num_attention_heads", 5), ("attention_variant", "hi")],
)
def test_another_model_is_refused(saved, key, value):
    described = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(described | {key: value}))
    with pytest.raises(ValueError, match=f"config.json: {key}"):
        from_pretrained(saved)


@pytest.mark.parametrize(
    "described",
    [
        {"model_type": []},
        {"model_type": "gpt2", "n_embd": None, "n_inner": None},
        {"model_type": "gpt2", "n_layer": 10**30},
        {"model_type": "bert", "architectures": 5},
        {"model_type": "bert", "layer_norm_eps": "x"},
        {"model_type": "bert", "architectures": ["T5Model"]},
        {"model_type": "gpt2", "embd_pdrop": 0.3},
    ],
)
def test_any_nonsense_in_a_configuration_is_a_value_error(saved, described):
    (saved / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"config.json: \w+: expected"):
        from_pretrained(saved)


def test_keys_that_are_absent_mean_what_they_mean_to_transformers(saved):
    (saved / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"no tensor transformer.wte.weight, .* \(50257, 768\)"):
        from_pretrained(saved)


def test_a_model_that_cannot_be_described_writes_nothing(saved, monkeypatch):
    from minisaobp.nn import pretrained

    before = (saved / "model.safetensors").read_bytes()
    monkeypatch.setattr(pretrained, "_description", lambda config: {"eps": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        tiny().save_pretrained(saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_names_of_the_first_bert_models(saved):
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def rename(tensors):
        for name in list(tensors):
            for new, was in old.items():
                if name.endswith(new):
                    tensors[name.replace(new, was)] = tensors.pop(name)

    rewrite(saved, rename)
    assert np.array_equal(from_pretrained(saved).parameters.flat, tiny(["high", "original"]).parameters.flat)


def test_numbers_of_numpys_kinds_are_saved(tmp_path):
    model = tiny()
    config = type(model.config)(**vars(model.config) | {"hidden_size": np.int64(12), "lam": np.float64(0.4)})
    type(model)(config, model.parameters).save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).config == model.config
