"""Language models as objects: a configuration and parameters, nothing else that changes."""

import math

import numpy as np

from ..backend import array_namespace
from . import decoder, encoder
from .parameters import Parameters
from .pretrained import load, save


class LanguageModel:
    """What BERT and GPT-2 have in common; any attention variant in each layer.

    config: Config; parameters: Parameters. Token ids, labels and masks are integer arrays (B, L); an attention_mask
    is 1 (or True) for tokens and 0 for padding. A label of -100 is ignored. Every method raises ValueError that names
    the argument, what was given and what was expected.
    """

    def __init__(self, config, parameters):
        self.config, self.parameters = config, parameters

    @classmethod
    def initialise(cls, config, rng, dtype=np.float32):
        """Matrices normal with standard deviation initializer_range, LayerNorm at identity, biases zero."""
        parameters = Parameters(cls.parameter_shapes(config), dtype=dtype)
        weights = parameters.flat[: parameters.matrices]
        weights[...] = rng.standard_normal(len(weights), np.float32) * config.initializer_range
        for name, view in parameters.items():
            if view.ndim == 1 and name.endswith(".weight"):  # the only vectors called weight are LayerNorm's
                view[...] = 1
        return cls(config, parameters)

    @classmethod
    def parameter_count(cls, config):
        """How many numbers a model of this configuration has, without making one."""
        return sum(math.prod(shape) for shape in cls.parameter_shapes(config).values())

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors into a directory; `from_pretrained` and transformers open it."""
        save(self.config, self.parameters, directory)

    def logits(self, ids, attention_mask=None):
        """Scores of every token of the vocabulary at every position, (B, L, V)."""
        hidden, _ = self._forward(ids, attention_mask)
        return self._head(hidden.reshape(-1, hidden.shape[-1])).reshape(*ids.shape, -1)

    def logits_where(self, ids, chosen, attention_mask=None):
        """The same at the chosen (B, L, booleans) positions only, (N, V) in the order of the text."""
        hidden, _ = self._forward(ids, attention_mask)
        return self._head(hidden[chosen])

    def attention_maps(self, ids, attention_mask=None):
        """Attention of every layer after refinement, (layers, B, H, L, L)."""
        return array_namespace(ids).stack(self._forward(ids, attention_mask)[1])

    def loss_and_gradients(self, ids, labels, attention_mask=None):
        """Mean cross-entropy in nats over the labelled tokens, and {name: gradient} as one Parameters."""
        valid = self._valid(ids, attention_mask)
        if labels.shape != ids.shape:
            raise ValueError(f"labels: expected the shape of ids, {ids.shape}, got {labels.shape}")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels: expected integers, got {labels.dtype} of shape {labels.shape}")
        given = labels[:, self.first_label :]
        given = given[given != -100]
        if not given.size:
            raise ValueError(f"labels: expected at least one label that is not -100, shape {labels.shape}")
        if given.min() < 0 or given.max() >= self.config.vocab_size:
            raise ValueError(f"labels: expected -100 or 0..{self.config.vocab_size - 1}, got {_range(given)}")
        return self._loss(ids, labels, valid)

    def _valid(self, ids, attention_mask):
        """The mask as booleans, None if there is no padding; ids and mask checked."""
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
            raise ValueError(f"ids: expected integers of shape (B, L), got {ids.dtype} of shape {ids.shape}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ids: expected at most max_position_embeddings = {self.config.max_position_embeddings} tokens, "
                f"got shape {ids.shape}"
            )
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(f"ids: expected 0..{self.config.vocab_size - 1}, got {_range(ids)}")
        if attention_mask is None:
            return None
        if attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask: expected the shape of ids, {ids.shape}, got {attention_mask.shape}")
        valid = attention_mask.astype(bool)
        return None if valid.all() else valid


class Bert(LanguageModel):
    """BERT with the masked-language-model head; a label stands at the token it is of."""

    parameter_shapes = staticmethod(encoder.parameter_shapes)
    first_label = 0

    def _forward(self, ids, attention_mask):
        return encoder.encode(ids, self.parameters, self.config, self._valid(ids, attention_mask))[:2]

    def _head(self, rows):
        w = self.parameters
        table = w["bert.embeddings.word_embeddings.weight"]
        return encoder.masked_lm_head(rows, w.under("cls.predictions."), table, self.config.layer_norm_eps)[0]

    def _loss(self, ids, labels, valid):
        return encoder.masked_lm_loss(ids, labels, self.parameters, self.config, valid)


class Gpt2(LanguageModel):
    """GPT-2 with the tied head; the label at position l is what position l - 1 predicts, so labels may be the ids.

    Refined attention is exactly causal (Appendix C): later tokens change nothing earlier, not in the last bit.
    """

    parameter_shapes = staticmethod(decoder.parameter_shapes)
    first_label = 1  # nothing predicts the first token

    def _forward(self, ids, attention_mask):
        return decoder.decode(ids, self.parameters, self.config, self._valid(ids, attention_mask))[:2]

    def _head(self, rows):
        return rows @ self.parameters["transformer.wte.weight"].T  # [N, D] @ [D, V] -> [N, V]

    def _loss(self, ids, labels, valid):
        return decoder.causal_lm_loss(ids, labels, self.parameters, self.config, valid)


MODELS = {"bert": Bert, "gpt2": Gpt2}


def from_pretrained(directory):
    """The model in a directory with config.json and model.safetensors, BERT or GPT-2, ours or Hugging Face's.

    Raises ValueError that names the file, the key or the tensor and both shapes (see `pretrained.load`).
    """
    config, parameters = load(directory, {name: model.parameter_shapes for name, model in MODELS.items()})
    return MODELS[config.model_type](config, parameters)


def _range(values):
    return f"{int(values.min())}..{int(values.max())}"
