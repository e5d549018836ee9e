"""Models as objects: a configuration and parameters, nothing else that changes."""

import dataclasses
import math
import numbers

import numpy as np

from ..backend import array_namespace, to_host
from . import decoder, encoder
from .generation import generate
from .heads import HEADS, POOLER, value_range
from .parameters import Parameters
from .pretrained import load, save
from .regularisers import (
    THRESHOLD,
    eigen_penalty,
    eigen_penalty_backward,
    entropy_penalty,
    entropy_penalty_backward,
)


class Model:
    """What BERT and GPT-2 have in common; any attention variant in each layer, any head.

    config: Config; parameters: Parameters, in whose library, NumPy or CuPy, everything is computed (`on`). Token ids,
    attention masks and token types are integer arrays (B, L), with the head "multiple_choice" (B, C, L), of either
    library; they are checked on the host. An attention_mask is 1 (or True) for tokens and 0 for padding. Every method
    raises ValueError that names the argument, what was given and what was expected.
    """

    def __init__(self, config, parameters):
        self._check(config)
        self.config, self.parameters = config, parameters
        self.head = HEADS[config.model_type, config.head]

    @classmethod
    def parameter_shapes(cls, config):
        """{name: shape} of every parameter of a model of this configuration."""
        cls._check(config)
        return cls.body_shapes(config) | HEADS[config.model_type, config.head].shapes(config)

    @classmethod
    def _check(cls, config):
        if config.model_type != cls.model_type:
            raise ValueError(f"config: expected model_type {cls.model_type!r}, got {config.model_type!r}")

    @classmethod
    def parameter_count(cls, config):
        """How many numbers a model of this configuration has, without making one."""
        return sum(math.prod(shape) for shape in cls.parameter_shapes(config).values())

    @classmethod
    def initialise(cls, config, rng, dtype=np.float32):
        """Matrices normal with standard deviation initializer_range, LayerNorm at identity, biases zero.

        dtype: float32 or float64.
        """
        if np.dtype(dtype).name not in ("float32", "float64"):
            raise ValueError(f"dtype: expected float32 or float64, got {np.dtype(dtype).name}")
        parameters = Parameters(cls.parameter_shapes(config), dtype=dtype)
        weights = parameters.flat[: parameters.matrices]
        weights[...] = rng.standard_normal(len(weights), np.float32) * config.initializer_range
        for name, view in parameters.items():
            if view.ndim == 1 and name.endswith(".weight"):  # the only vectors called weight are LayerNorm's
                view[...] = 1
            if name.endswith(".lam"):
                view[...] = config.lams[_layer_number(name)]
            if name.endswith(".theta"):
                view[...] = THRESHOLD
        return cls(config, parameters)

    def with_head(self, head, rng, num_labels=2):
        """A new model with this one's encoder (and pooler) and a new head, drawn from rng: for fine-tuning."""
        config = dataclasses.replace(self.config, head=head, num_labels=num_labels)
        model = type(self).initialise(config, rng, self.parameters.flat.dtype).on(self._xp)
        body = {*self.body_shapes(config), POOLER + "weight", POOLER + "bias"}
        for name in body & self.parameters.keys() & model.parameters.keys():
            model.parameters[name][...] = self.parameters[name]
        return model

    def on(self, xp):
        """This model with its parameters in that library, numpy or cupy: itself if they are there."""
        if array_namespace(self.parameters.flat) is xp:
            return self
        flat = to_host(self.parameters.flat) if xp is np else xp.asarray(self.parameters.flat)
        return type(self)(self.config, self.parameters.like(flat))

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors into a directory; `from_pretrained` and transformers open it."""
        save(self.config, self.parameters, directory)

    def logits(self, ids, attention_mask=None, token_type_ids=None):
        """What the head says: (B, L, V) scores of the vocabulary; (B, C) of classes or choices, or numbers of a
        regression; (B, 2, L) of every token to start or end the answer; (B, D) the pooler's output without a head."""
        hidden, _, _ = self._body(*self._inputs(ids, attention_mask, token_type_ids))
        scores, _ = self._scores(hidden, ids, self._rows(ids, None))
        return scores.reshape(*ids.shape, -1) if self.config.head == "lm" else scores

    def scored(self, ids, labels, attention_mask=None, token_type_ids=None):
        """Scores (n, classes) and targets (n,), the labels, as the loss compares them: only where a label is.

        With the head "regression" both are (B, C) numbers.
        """
        inputs = self._inputs(ids, attention_mask, token_type_ids)
        labels = self._labels(ids, labels)
        hidden, _, _ = self._body(*inputs)
        scores, _ = self._scores(hidden, ids, self._rows(ids, labels))
        return scores.reshape(-1, scores.shape[-1]), self._xp.asarray(self.head.targets(labels))

    def hidden_states(self, ids, attention_mask=None, token_type_ids=None):
        """What the last layer makes of every token, (B, L, D)."""
        hidden, _, _ = self._body(*self._inputs(ids, attention_mask, token_type_ids))
        return hidden

    def attention_maps(self, ids, attention_mask=None, token_type_ids=None):
        """Attention of every layer after refinement, (layers, B, H, L, L)."""
        _, maps, _ = self._body(*self._inputs(ids, attention_mask, token_type_ids))
        return self._xp.stack(maps)

    def loss_and_gradients(self, ids, labels, attention_mask=None, token_type_ids=None, rng=None):
        """Loss, mean over all labels, in nats (of a regression the mean squared error), and {name: gradient}.

        The penalty of the configuration's regulariser, if there is one, is part of the loss.

        labels: (B, L) with -100 where none is asked for; GPT-2 shifts them itself, so they may be the ids; (B,)
        classes, choices or numbers; (B, 2) first and last token of the answer. rng: a generator of the arrays' library
        that draws dropout, or None for none. The gradients are one Parameters.
        """
        xp, D = self._xp, self.config.hidden_size
        inputs = self._inputs(ids, attention_mask, token_type_ids)
        labels = self._labels(ids, labels)
        hidden, maps, cache = self._body(*inputs, rng)
        rows = self._rows(ids, labels)
        scores, head_cache = self._scores(hidden, ids, rows, rng)
        targets = xp.asarray(self.head.targets(labels))
        loss, loss_cache = self.head.loss(scores.reshape(-1, scores.shape[-1]), targets)

        g = self.parameters.like(xp.zeros_like(self.parameters.flat))
        dscores = self.head.loss_backward(1.0, loss_cache).reshape(scores.shape)
        dhidden = xp.zeros_like(hidden)
        dhidden.reshape(-1, D)[rows] = self.head.backward(dscores, head_cache, g)
        dmaps = [None] * len(maps)
        if self.config.regulariser == "entropy":
            loss = loss + self._entropy_penalty(maps, inputs[2], dmaps, g)
        self._backward(dhidden, cache, g, dmaps)
        if self.config.regulariser == "eigen":
            loss = loss + self._eigen_penalty(g)
        return loss, g

    def _entropy_penalty(self, maps, valid, dmaps, g):
        """The penalty; its gradients of the attention are written into dmaps and those of theta into g."""
        layers, total = self.config.regularised, 0
        strength = self.config.regulariser_strength / len(layers)
        for n in layers:
            name = self.own_names.format(n) + "theta"
            penalty, cache = entropy_penalty(maps[n], self.parameters[name], valid)
            dmaps[n], g[name][...] = entropy_penalty_backward(strength, cache)
            total += strength * penalty
        return total

    def _eigen_penalty(self, g):
        """The penalty; its gradients of the query and key maps are added to g."""
        layers, total = self.config.regularised, 0
        strength = self.config.regulariser_strength / len(layers)
        for n in layers:
            penalty, cache = eigen_penalty(*self.query_and_key(self.parameters, self.config, n))
            gradients = eigen_penalty_backward(strength, cache)
            for view, gradient in zip(self.query_and_key(g, self.config, n), gradients, strict=True):
                view += gradient
            total += strength * penalty
        return total

    def _scores(self, hidden, ids, rows, rng=None):
        return self.head.forward(hidden.reshape(-1, hidden.shape[-1])[rows], self.parameters, self.config, ids, rng)

    def _rows(self, ids, labels):
        """Which rows of the hidden states (sequences L, D) the head reads."""
        rows = self.head.positions(to_host(ids), labels)
        return rows if isinstance(rows, slice) else self._xp.asarray(rows)

    @property
    def _xp(self):
        """The library of the parameters, in which everything is computed."""
        return array_namespace(self.parameters.flat)

    def _labels(self, ids, labels):
        """The labels, checked, on the host, where it costs a GPU no waiting to look at them."""
        if not hasattr(labels, "dtype"):
            raise TypeError(f"labels: expected an array, got {type(labels).__name__}")
        labels = to_host(labels)
        self.head.check(labels, ids, self.config)
        return labels

    def _inputs(self, ids, attention_mask, token_type_ids):
        """ids (sequences, L), token types or None, and the mask as booleans or None if there is no padding; checked."""
        for name, array in (("ids", ids), ("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if array is not None and not hasattr(array, "dtype"):
                raise TypeError(f"{name}: expected an array, got {type(array).__name__}")
        xp = self._xp
        ids, attention_mask, token_type_ids = (
            None if array is None else to_host(array) for array in (ids, attention_mask, token_type_ids)
        )
        shape = "(B, C, L)" if self.config.head == "multiple_choice" else "(B, L)"
        if ids.ndim != shape.count(",") + 1 or ids.dtype.kind not in "iu" or not ids.size:
            raise ValueError(f"ids: expected integers of shape {shape}, got {ids.dtype} of shape {ids.shape}")
        if ids.shape[-1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ids: expected at most max_position_embeddings = {self.config.max_position_embeddings} tokens, "
                f"got shape {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"ids: expected 0..{self.config.vocab_size - 1}, got {value_range(ids)}")
        for name, array in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if array is not None and array.shape != ids.shape:
                raise ValueError(f"{name}: expected the shape of ids, {ids.shape}, got {array.shape}")
        types = token_type_ids
        if types is not None:
            kinds = self.config.type_vocab_size if self.config.model_type == "bert" else 0
            what = f"integers 0..{kinds - 1}" if kinds else "None: GPT-2 has no token types"
            if types.dtype.kind not in "iu":
                raise ValueError(f"token_type_ids: expected {what}, got {types.dtype}")
            if types.min() < 0 or types.max() >= kinds:
                raise ValueError(f"token_type_ids: expected {what}, got {value_range(types)}")
        if attention_mask is not None and (
            attention_mask.dtype.kind not in "biuf" or not ((attention_mask == 0) | (attention_mask == 1)).all()
        ):
            raise ValueError(f"attention_mask: expected 1 for tokens and 0 for padding, got {attention_mask.dtype}")
        L = ids.shape[-1]
        valid = None if attention_mask is None or attention_mask.all() else attention_mask.reshape(-1, L).astype(bool)
        types = None if types is None else xp.asarray(types.reshape(-1, L))
        return xp.asarray(ids.reshape(-1, L)), types, None if valid is None else xp.asarray(valid)


class Bert(Model):
    """BERT: an encoder and any head; as a language model a label stands at the token it is of."""

    model_type = "bert"
    body_shapes = staticmethod(encoder.parameter_shapes)
    own_names, query_and_key = encoder.OWN, staticmethod(encoder.query_and_key)

    def _body(self, ids, types, valid, rng=None):
        return encoder.encode(ids, types, self.parameters, self.config, valid, rng)

    def _backward(self, dhidden, cache, g, dmaps):
        encoder.encode_backward(dhidden, cache, self.parameters, g, self.config, dmaps)


class Gpt2(Model):
    """GPT-2 with the tied head; the label at position l is what position l - 1 predicts, so labels may be the ids.

    Refined attention is exactly causal (Appendix C): later tokens change nothing earlier, not in the last bit.
    """

    model_type = "gpt2"
    body_shapes = staticmethod(decoder.parameter_shapes)
    own_names, query_and_key = decoder.OWN, staticmethod(decoder.query_and_key)

    def _body(self, ids, types, valid, rng=None):
        return decoder.decode(ids, self.parameters, self.config, valid, rng)

    def _backward(self, dhidden, cache, g, dmaps):
        decoder.decode_backward(dhidden, cache, self.parameters, g, dmaps)

    def generate(self, ids, tokens, temperature=0.0, top_k=None, rng=None):
        """An iterator over `tokens` further tokens of every sequence, (B,) each; ids (B, L) prompts of one length.

        temperature 0 takes the likeliest token; otherwise rng draws it from softmax(logits / temperature), or from the
        top_k likeliest alone. The logits are those of the whole text, to rounding, for every attention variant; what
        is kept from token to token, `generation.py` says.
        """
        self._inputs(ids, None, None)
        for name, value in (("tokens", tokens), ("top_k", 1 if top_k is None else top_k)):
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
        room = self.config.max_position_embeddings - ids.shape[1]
        if tokens > room:
            raise ValueError(
                f"tokens: expected at most {room} after a prompt of {ids.shape[1]}, for max_position_embeddings = "
                f"{self.config.max_position_embeddings}, got {tokens}"
            )
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
        if temperature and rng is None:
            raise ValueError("rng: expected a generator to draw from, since temperature > 0")
        return generate(self._xp.asarray(ids), self.parameters, self.config, tokens, temperature, top_k, rng)


MODELS = {"bert": Bert, "gpt2": Gpt2}


def from_pretrained(directory):
    """The model in a directory with config.json and model.safetensors, BERT or GPT-2, ours or Hugging Face's.

    Raises ValueError that names the file, the key or the tensor and both shapes (see `pretrained.load`).
    """
    config, parameters = load(directory, {name: model.parameter_shapes for name, model in MODELS.items()})
    return MODELS[config.model_type](config, parameters)


def _layer_number(name):
    return int(next(part for part in name.split(".") if part.isdigit()))
