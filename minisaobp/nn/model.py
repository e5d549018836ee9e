"""A masked language model as an object: a configuration and parameters, nothing else that changes."""

import numpy as np

from ..backend import array_namespace
from .encoder import encode, masked_lm_head, masked_lm_loss, parameter_shapes
from .parameters import Parameters
from .pretrained import load, save


class Bert:
    """BERT for masked language modelling with any attention variant in each layer.

    config: Config; parameters: Parameters. Token ids, labels and masks are integer arrays (B, L); an attention_mask
    is 1 (or True) for tokens and 0 for padding. A label of -100 is ignored.
    """

    def __init__(self, config, parameters):
        self.config, self.parameters = config, parameters

    @classmethod
    def initialise(cls, config, rng, dtype=np.float32):
        """Matrices normal with standard deviation initializer_range, LayerNorm at identity, biases zero."""
        parameters = Parameters(parameter_shapes(config), dtype=dtype)
        weights = parameters.flat[: parameters.matrices]
        weights[...] = rng.standard_normal(len(weights), np.float32) * config.initializer_range
        for name, view in parameters.items():
            if name.endswith("LayerNorm.weight"):
                view[...] = 1
        return cls(config, parameters)

    @classmethod
    def from_pretrained(cls, directory):
        """The model in a directory with config.json and model.safetensors, ours or Hugging Face's BertForMaskedLM.

        Raises ValueError that names the file, the key or the tensor and both shapes (see `pretrained.load`).
        """
        return cls(*load(directory))

    def save_pretrained(self, directory):
        """Write config.json and model.safetensors into a directory; `from_pretrained` and transformers open it."""
        save(self.config, self.parameters, directory)

    def logits(self, ids, attention_mask=None):
        """Scores of every token of the vocabulary at every position, (B, L, V)."""
        hidden, _, _ = encode(ids, self.parameters, self.config, self._valid(ids, attention_mask))
        scores = self._head(hidden.reshape(-1, hidden.shape[-1]))
        return scores.reshape(*ids.shape, -1)

    def logits_where(self, ids, chosen, attention_mask=None):
        """The same at the chosen (B, L, booleans) positions only, (N, V) in the order of the text."""
        hidden, _, _ = encode(ids, self.parameters, self.config, self._valid(ids, attention_mask))
        return self._head(hidden[chosen])

    def attention_maps(self, ids, attention_mask=None):
        """Attention of every layer after refinement, (layers, B, H, L, L)."""
        _, maps, _ = encode(ids, self.parameters, self.config, self._valid(ids, attention_mask))
        return array_namespace(ids).stack(maps)

    def loss_and_gradients(self, ids, labels, attention_mask=None):
        """Mean cross-entropy in nats over the labelled tokens, and {name: gradient} as one Parameters."""
        self._check_ids(ids)
        if labels.shape != ids.shape:
            raise ValueError(f"labels: expected the shape of ids, {ids.shape}, got {labels.shape}")
        given = labels[labels != -100]
        if not given.size:
            raise ValueError(f"labels: expected at least one label that is not -100, shape {labels.shape}")
        if given.min() < 0 or given.max() >= self.config.vocab_size:
            raise ValueError(f"labels: expected -100 or 0..{self.config.vocab_size - 1}, got {_range(given)}")
        return masked_lm_loss(ids, labels, self.parameters, self.config, self._valid(ids, attention_mask))

    def _head(self, rows):
        w = self.parameters
        table = w["bert.embeddings.word_embeddings.weight"]
        return masked_lm_head(rows, w.under("cls.predictions."), table, self.config.layer_norm_eps)[0]

    def _check_ids(self, ids):
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"ids: expected integers of shape (B, L), got {ids.dtype} of shape {ids.shape}")
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ids: expected at most max_position_embeddings = {self.config.max_position_embeddings} tokens, "
                f"got shape {ids.shape}"
            )
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise ValueError(f"ids: expected 0..{self.config.vocab_size - 1}, got {_range(ids)}")

    def _valid(self, ids, attention_mask):
        self._check_ids(ids)
        if attention_mask is None:
            return None
        if attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask: expected the shape of ids, {ids.shape}, got {attention_mask.shape}")
        valid = attention_mask.astype(bool)
        return None if valid.all() else valid


def _range(values):
    return f"{int(values.min())}..{int(values.max())}"
