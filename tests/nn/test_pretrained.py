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
