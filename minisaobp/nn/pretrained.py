"""Models on disk as Hugging Face stores them: config.json and model.safetensors, read and written without pickle."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from ..backend import to_host
from ..files import write_json, write_whole
from .config import Config
from .parameters import Parameters

# GPT-2's names for what Config calls as BERT does
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "hidden_dropout_prob": "resid_pdrop",
    "attention_probs_dropout_prob": "attn_pdrop",
}
# keys with only one value implemented, and what a file without the key means
FIXED = {
    "bert": {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "is_decoder": False,
        "classifier_dropout": None,
    },
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
}
# what transformers takes where config.json has no such key
ABSENT = {
    "bert": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "gpt2": {
        "vocab_size": 50257,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
    },
}
# Hugging Face's name of the model with each head; the first of a head is what is written
ARCHITECTURES = {
    ("bert", "lm"): ("BertForMaskedLM", "BertForPreTraining"),
    ("bert", "none"): ("BertModel",),
    ("bert", "classification"): ("BertForSequenceClassification",),
    ("bert", "regression"): ("BertForSequenceClassification",),
    ("bert", "multiple_choice"): ("BertForMultipleChoice",),
    ("bert", "span"): ("BertForQuestionAnswering",),
    ("gpt2", "lm"): ("GPT2LMHeadModel", "GPT2Model"),
}
PREFIX = {"bert": "bert.", "gpt2": "transformer."}  # which BertModel and GPT2Model alone leave out of their names
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.weight": "transformer.wte.weight",
}


def load(directory, shapes_of):
    """Config and Parameters from a directory that `save` or Hugging Face's model wrote.

    shapes_of: {model type: function from a Config to {name: shape}}. Keys of config.json that it does not know are
    ignored, those that would make another model refused. Weights keep their dtype if it is float32 or float64; float16
    becomes float32. Tensors that the model has no use for are left out. Raises ValueError that names
    the file, the key or the tensor and both shapes.
    """
    directory = Path(directory)
    config = _config(directory / "config.json")
    path = directory / "model.safetensors"
    try:
        tensors = {_modern(name): tensor for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from None
    except (TypeError, AttributeError, KeyError):
        raise ValueError(
            f"{path}: expected float16, float32 or float64, not a dtype without NumPy's (bfloat16)"
        ) from None
    shapes = shapes_of[config.model_type](config)
    prefix = PREFIX[config.model_type]
    if not any(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path} has no tensor {name}, which config.json asks for with shape {shape}")
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {tensors[name].shape}, config.json asks for {shape}")
        if tensors[name].dtype.kind != "f":
            raise ValueError(f"{path}: {name} is {tensors[name].dtype}, expected floating point")
    for copy, original in TIED.items():
        if copy in tensors and original in shapes and not np.array_equal(tensors[copy], tensors[original]):
            raise ValueError(f"{path}: {copy} differs from {original}; only tied weights are implemented")
    dtype = np.result_type(np.float32, *(tensors[name].dtype for name in shapes))
    parameters = Parameters(shapes, dtype=dtype)
    for name, view in parameters.items():
        view[...] = tensors[name]
    return config, parameters


def save(config, parameters, directory):
    """Write config.json and model.safetensors into a directory, made if it is not there; transformers opens it.

    Each file is written beside and renamed, the weights first: a directory never holds half of either.
    """
    directory = Path(directory)
    described = _description(config)
    json.dumps(described, allow_nan=False)  # fails, if it does, before anything is written
    directory.mkdir(parents=True, exist_ok=True)
    # contiguous copies: safetensors writes the memory of a strided view as if it had no strides
    tensors = {name: np.ascontiguousarray(to_host(view)) for name, view in parameters.items()}
    if config.head == "none":
        tensors = {name.removeprefix(PREFIX[config.model_type]): tensor for name, tensor in tensors.items()}
    data = serialise(tensors, metadata={"format": "pt"})  # transformers asks for a format, and means its layout by it
    write_whole(directory / "model.safetensors", lambda file: file.write(data))
    write_json(directory / "config.json", described)


def _description(config):
    """The Config in Hugging Face's keys."""
    names = GPT2_KEYS if config.model_type == "gpt2" else {}
    described = {names.get(key, key): value for key, value in dataclasses.asdict(config).items()}
    labels = {str(n): f"LABEL_{n}" for n in range(described.pop("num_labels"))}
    described["architectures"] = [ARCHITECTURES[config.model_type, described.pop("head")][0]]
    if config.model_type == "gpt2":
        described["embd_pdrop"] = config.hidden_dropout_prob
    if config.head in ("classification", "regression"):
        described["id2label"] = labels
        described["label2id"] = {label: int(n) for n, label in labels.items()}
        kinds = {"classification": "single_label_classification", "regression": "regression"}
        described["problem_type"] = kinds[config.head]
    return described | FIXED[config.model_type]


def _modern(name):
    """A tensor's name as it is written today; the first BERT models call a LayerNorm's gamma and beta so."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(path):
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(described, dict):
        raise ValueError(f"{path}: expected an object, got {type(described).__name__}")
    kind = described.get("model_type")
    if not isinstance(kind, str) or kind not in FIXED:
        raise ValueError(f"{path}: model_type: expected one of {', '.join(FIXED)}, got {kind!r}")
    for key, only in FIXED[kind].items():
        if described.get(key, only) != only:
            raise ValueError(f"{path}: {key}: expected {only!r}, got {described[key]!r}")
    described = ABSENT[kind] | described
    if kind == "gpt2":
        if described.get("n_inner") is None and isinstance(described["n_embd"], int):
            described["n_inner"] = 4 * described["n_embd"]
        described |= {ours: described[theirs] for ours, theirs in GPT2_KEYS.items() if theirs in described}
        described["pad_token_id"] = None  # its embedding is trained like any other, as transformers does for GPT-2
        if described.get("embd_pdrop", 0.1) != described.get("resid_pdrop", 0.1):
            raise ValueError(
                f"{path}: embd_pdrop: expected the value of resid_pdrop, {described.get('resid_pdrop', 0.1)!r}, "
                f"got {described.get('embd_pdrop', 0.1)!r}"
            )
    described |= _head(described, path)
    known = {field.name for field in dataclasses.fields(Config)}
    try:
        return Config(**{key: value for key, value in described.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _head(described, path):
    """head and num_labels, as Hugging Face's keys say them."""
    kind = described["model_type"]
    named = described.get("architectures") or [ARCHITECTURES[kind, "lm"][0]]
    architecture = named[0] if isinstance(named, list) else named
    heads = [head for (model, head), names in ARCHITECTURES.items() if model == kind and architecture in names]
    if not heads:
        known = dict.fromkeys(name for (model, _), names in ARCHITECTURES.items() if model == kind for name in names)
        raise ValueError(f"{path}: architectures: expected one of {', '.join(known)}, got {architecture!r}")
    if heads[0] != "classification":
        return {"head": heads[0], "num_labels": 2}
    labels = described.get("id2label")
    count = len(labels) if isinstance(labels, dict) else described.get("num_labels", 2)
    asked = described.get("problem_type")
    if asked == "multi_label_classification":
        raise ValueError(f"{path}: problem_type: expected regression or single_label_classification, got {asked!r}")
    regression = asked == "regression" or (asked is None and count == 1)
    return {"head": "regression" if regression else "classification", "num_labels": count}
