"""Golden vectors of whole models: one block, a tiny BERT and a tiny GPT-2, their gradients and ten training steps.

They are computed in float64 by `minisaobp.nn`, whose last digits depend on the processor and its matrix products (by
less than 1e-13), so what is written down is rounded to a whole number of 2^-28; `rounded` refuses numbers so close to
the middle of two that another machine could round the other way.

Axis letters: B batch, L tokens, D model width, H heads, F feed-forward width, V vocabulary.
"""

import dataclasses

import numpy as np

from ..nn.config import Config
from ..nn.encoder import QKV, block, block_backward
from ..nn.model import MODELS
from ..nn.parameters import Parameters
from ..text.batches import Batch
from ..training.adamw import AdamW
from ..training.loop import Settings, train
from .cases import integers
from .describe import described, entry
from .tensors import safetensors_bytes

GRID = 2.0**-28
MARGIN = 1e-13  # how far, at least, a number is from where it would be rounded the other way
SEEDS = {"block": 0, "bert": 0, "gpt2": 0}  # ones that keep the margin
TOLERANCE = {
    "float64": 1e-8,
    "float32": 2e-4,
    "reason": "the numbers are rounded to 2^-28, which errs by 2e-9; float32 errs by 1e-6 in a loss and its gradient, "
    "and AdamW divides by the square root of tiny squares, which ten steps of 1e-3 turn into 1e-4 at most",
}
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "lam": 0.2,
}
CONFIGS = {
    "bert": Config(vocab_size=20, attention_variant=["high", "elemmul"], **SIZES),
    "gpt2": Config(vocab_size=20, attention_variant=["high", "low"], model_type="gpt2", layer_norm_eps=1e-5, **SIZES),
}
SETTINGS = Settings(steps=10, batch=2, peak_rate=1e-3, warmup=2)
UNUSED = ("num_labels", "regulariser", "regulariser_strength")  # of a configuration
ADAM_EPS = 1e-6  # at 1e-8 a gradient that is zero but for rounding would move its weight
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], bool)  # (B, L)


class TooClose(ValueError):
    """A number lies so close to the middle between two rounded ones that machines may differ: take another seed."""


def model_cases():
    """[(id, {file: bytes}, dictionary of case.json)]."""
    return [_block_case(), *(_model_case(kind) for kind in CONFIGS)]


def rounded(x):
    """x, float64, at the nearest whole number of 2^-28. Raises TooClose."""
    units = np.asarray(x, np.float64) / GRID
    if (abs(abs(units - np.floor(units)) - 0.5) < MARGIN / GRID).any():
        raise TooClose
    return np.round(units) * GRID + 0.0


def numbers(seed, shape, largest):
    """Whole numbers over 2^15, times `largest`, a power of two."""
    return (integers(seed, shape, 16) - (1 << 15)) / (1 << 15) * largest


def weights_of(shapes, seed):
    """Parameters in float64, all drawn: uniform to +-1/2, LayerNorm's weights around 1."""
    parameters = Parameters(shapes, dtype=np.float64)
    parameters.flat[...] = numbers(seed, parameters.flat.shape, 0.5)
    for name, view in parameters.items():
        if view.ndim == 1 and name.endswith("weight"):
            view[...] = 1 + view / 4
    return parameters


def _model_case(kind):
    config, model_class, seed = CONFIGS[kind], MODELS[kind], SEEDS[kind]
    parameters = weights_of(model_class.parameter_shapes(config), [seed, 1])
    model = model_class(config, parameters)
    ids = 1 + integers([seed, 2], MASK.shape, 4)  # 1 to 16: 0 is padding
    labels = np.where(MASK & (integers([seed, 3], MASK.shape, 1) == 0), 1 + integers([seed, 4], MASK.shape, 4), -100)
    labels = labels if kind == "bert" else np.where(MASK, ids, -100)
    ids = np.where(MASK, ids, 0)
    batch = Batch(ids, labels, MASK)
    inputs = {"ids": ids, "labels": labels, "attention_mask": MASK}
    inputs |= {f"weight.{name}": view.copy() for name, view in parameters.items()}
    loss, gradients = model.loss_and_gradients(*batch)
    found = {
        "attention": ("intermediate", model.attention_maps(ids, MASK)),
        "logits": ("output", model.logits(ids, MASK)),
        "loss": ("output", np.asarray(loss)),
        **{f"gradient.{name}": ("gradient", view) for name, view in gradients.items()},
    }
    optimiser = AdamW.for_parameters(parameters, weight_decay=SETTINGS.weight_decay, eps=ADAM_EPS)
    losses = [loss for loss, _ in train(model, _Same(batch), SETTINGS, optimiser)]
    found["losses"] = ("output", np.array(losses))
    found |= {f"trained.{name}": ("output", view) for name, view in parameters.items()}
    config = {name: value for name, value in dataclasses.asdict(config).items() if name not in UNUSED}
    training = dataclasses.asdict(SETTINGS) | {"optimiser": "AdamW", "betas": optimiser.betas, "eps": ADAM_EPS}
    training |= {"decayed": "matrices", "schedule": "linear warm-up, then a cosine to zero"}
    about = {"what": kind, "concerns": "Eqs. 1, 7-11, 15 and 16 in a language model", "seed": seed}
    parameters = {"config": config, "training": training}
    return _files_and_description(f"{kind}-tiny", about | {"parameters": parameters}, inputs, found)


class _Same:
    """The same batch in every step."""

    def __init__(self, batch):
        self._batch = batch

    def batch(self, number, size):
        return self._batch


def _block_case():
    config, seed = CONFIGS["bert"], SEEDS["block"]
    prefix = "bert.encoder.layer.0."
    shapes = {
        name.removeprefix(prefix): shape
        for name, shape in MODELS["bert"].parameter_shapes(config).items()
        if name.startswith(prefix)
    }
    weights = weights_of(shapes, [seed, 1])
    x, dy = (numbers([seed, n], (*MASK.shape, config.hidden_size), 2.0) for n in (2, 3))
    dy = np.where(MASK[..., None], dy, 0)
    qkv = [weights.stacked([name + kind for name in QKV]) for kind in (".weight", ".bias")]
    lam = np.full((1, 1, 1), config.lams[0])  # an array, so that it has a gradient
    y, A, cache = block(x, None, weights, *qkv, lam, "high", config, MASK)
    gradients = weights.like(np.zeros_like(weights.flat))
    dqkv = [gradients.stacked([name + kind for name in QKV]) for kind in (".weight", ".bias")]
    dx, _, dlam = block_backward(dy, cache, gradients, *dqkv)
    inputs = {"x": x, "dy": dy, "valid": MASK} | {f"weight.{name}": view for name, view in weights.items()}
    found = {
        "softmax": ("intermediate", cache.attention.weights.P),
        "attention": ("intermediate", A),
        "y": ("output", y),
        "dx": ("gradient", dx),
        "dlam": ("gradient", dlam.reshape(())),
        **{f"gradient.{name}": ("gradient", view) for name, view in gradients.items()},
    }
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "intermediate_size")}
    parameters = {"variant": "high", "lam": config.lams[0], "layer_norm_eps": config.layer_norm_eps, **sizes}
    about = {"what": "block", "concerns": "Eqs. 1 and 7-11 in an encoder block", "seed": seed, "parameters": parameters}
    return _files_and_description("block-encoder", about, inputs, found)


def _files_and_description(name, about, inputs, found):
    found = {tensor: (role, rounded(array)) for tensor, (role, array) in found.items()}
    file = "tensors.safetensors"
    entries = {tensor: entry(file, "input", array) for tensor, array in inputs.items()}
    entries |= {tensor: entry(file, role, array, TOLERANCE) for tensor, (role, array) in found.items()}
    files = {file: safetensors_bytes(inputs | {tensor: array for tensor, (_, array) in found.items()})}
    about |= {"dtype": "float64", "flags": ["must"]}
    return name, files, described(name, about, entries, files)
