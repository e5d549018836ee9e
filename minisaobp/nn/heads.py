"""What reads the hidden states: language models, classification, regression, multiple choice, spans.

Axis letters: B sequences, C classes or choices, L tokens, D model width, N rows that are read, V vocabulary. Heads have
no state: `w` are all Parameters of the model, and gradients are written into `g`. All have the methods of `Head`.
"""

import numpy as np

from ..backend import array_namespace
from . import ops

IGNORED = -100  # the label of a token that is not asked for


class Head:
    """What every head can do; what is written here holds for those that read the first token of each sequence."""

    loss = staticmethod(ops.cross_entropy)
    loss_backward = staticmethod(ops.cross_entropy_backward)

    def shapes(self, config):
        """{name: shape} of the head's own parameters."""
        return {}

    def positions(self, ids, labels=None):
        """Which rows of the hidden states (B L, D) are read: an index array, or a slice for all of them."""
        return array_namespace(ids).arange(0, ids.size, ids.shape[-1])

    def forward(self, x, w, config, ids, rng=None):
        """Rows x (N, D) -> scores (..., classes), cache. rng: draws dropout."""
        raise NotImplementedError

    def backward(self, dscores, cache, g):
        """dscores in the shape of the scores -> dx (N, D)."""
        raise NotImplementedError

    def targets(self, labels):
        """The labels that the scores, seen as (n, classes), are compared with, (n,)."""
        return labels.reshape(-1)

    def check(self, labels, ids, config):
        """Raise ValueError unless labels, which go with ids, are whole numbers of the head's shape and range."""
        shape, classes = self.expected(ids, config)
        if labels.shape != shape:
            raise ValueError(f"labels: expected the shape {shape} for ids of shape {ids.shape}, got {labels.shape}")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels: expected integers, got {labels.dtype} of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels: expected 0..{classes - 1}, got {value_range(labels)}")

    def expected(self, ids, config):
        """Shape of the labels and the number of classes."""
        return ids.shape[:1], config.num_labels


# ---- language models ------------------------------------------------------------------------------------------------


class LanguageModelHead(Head):
    """Scores of every word at each token that is read; labels (B, L), of which -100 is ignored."""

    def positions(self, ids, labels=None):
        if labels is None:
            return slice(None)
        return array_namespace(ids).flatnonzero(self.asked(labels) != IGNORED)

    def targets(self, labels):
        asked = self.asked(labels)
        return asked[asked != IGNORED]

    def asked(self, labels):
        """The labels, each where it is to be predicted."""
        return labels

    def check(self, labels, ids, config):
        if labels.shape != ids.shape:
            raise ValueError(f"labels: expected the shape of ids, {ids.shape}, got {labels.shape}")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"labels: expected integers, got {labels.dtype} of shape {labels.shape}")
        given = self.targets(labels)
        if not given.size:
            raise ValueError(f"labels: expected at least one label that is not -100, shape {labels.shape}")
        if given.min() < 0 or given.max() >= config.vocab_size:
            raise ValueError(f"labels: expected -100 or 0..{config.vocab_size - 1}, got {value_range(given)}")


class MaskedLM(LanguageModelHead):
    """LayerNorm(gelu(W h + b)) table^T + bias; the table is the word embedding. A label stands at its own token."""

    def shapes(self, config):
        D = config.hidden_size
        return {
            "cls.predictions.transform.dense.weight": (D, D),
            "cls.predictions.transform.dense.bias": (D,),
            "cls.predictions.transform.LayerNorm.weight": (D,),
            "cls.predictions.transform.LayerNorm.bias": (D,),
            "cls.predictions.bias": (config.vocab_size,),
        }

    def forward(self, x, w, config, ids, rng=None):
        w, table = w.under("cls.predictions."), w["bert.embeddings.word_embeddings.weight"]
        t, dense_cache = ops.linear_gelu(x, w["transform.dense.weight"], w["transform.dense.bias"])
        gamma, beta = w["transform.LayerNorm.weight"], w["transform.LayerNorm.bias"]
        t, norm_cache = ops.layer_norm(t, gamma, beta, config.layer_norm_eps)
        scores, table_cache = ops.linear(t, table, w["bias"])  # [N, D] @ [D, V] -> [N, V]
        return scores, (dense_cache, norm_cache, table_cache)

    def backward(self, dscores, cache, g):
        dense_cache, norm_cache, table_cache = cache
        table, g = g["bert.embeddings.word_embeddings.weight"], g.under("cls.predictions.")
        dt, table[...], g["bias"][...] = ops.linear_backward(dscores, table_cache)
        dt, g["transform.LayerNorm.weight"][...], g["transform.LayerNorm.bias"][...] = ops.layer_norm_backward(
            dt, norm_cache
        )
        dx, g["transform.dense.weight"][...], g["transform.dense.bias"][...] = ops.linear_gelu_backward(dt, dense_cache)
        return dx


class CausalLM(LanguageModelHead):
    """h table^T with the word embedding as table; the label at position l is what position l - 1 predicts."""

    def asked(self, labels):
        asked = array_namespace(labels).full(labels.shape, IGNORED)
        asked[:, :-1] = labels[:, 1:]
        return asked

    def forward(self, x, w, config, ids, rng=None):
        table = w["transformer.wte.weight"]
        return x @ table.T, (x, table)  # [N, D] @ [D, V] -> [N, V]

    def backward(self, dscores, cache, g):
        x, table = cache
        g["transformer.wte.weight"][...] = dscores.T @ x
        return dscores @ table


# ---- heads that read the encoder's pooler, which sees the first token -----------------------------------------------

POOLER = "bert.pooler.dense."


class Pooler(Head):
    """No head but BERT's pooler: its scores are tanh(W h + b) of the first token, (B, D). It has no loss."""

    def shapes(self, config):
        D = config.hidden_size
        return {POOLER + "weight": (D, D), POOLER + "bias": (D,)}

    def forward(self, x, w, config, ids, rng=None):
        t, dense_cache = ops.linear(x, w[POOLER + "weight"], w[POOLER + "bias"])
        y, tanh_cache = ops.tanh(t)
        return y, (dense_cache, tanh_cache)

    def backward(self, dscores, cache, g):
        dense_cache, tanh_cache = cache
        dt = ops.tanh_backward(dscores, tanh_cache)
        dx, g[POOLER + "weight"][...], g[POOLER + "bias"][...] = ops.linear_backward(dt, dense_cache)
        return dx

    def check(self, labels, ids, config):
        raise ValueError("labels: this model has no head to train; expected one made by with_head")


class Classification(Pooler):
    """Scores of num_labels classes, (B, C); labels (B,)."""

    check = Head.check

    def shapes(self, config):
        C = self.outputs(config)
        return super().shapes(config) | {"classifier.weight": (C, config.hidden_size), "classifier.bias": (C,)}

    def outputs(self, config):
        """Numbers that one row gives."""
        return config.num_labels

    def forward(self, x, w, config, ids, rng=None):
        pooled, pooler_cache = super().forward(x, w, config, ids, rng)
        pooled, dropout_cache = ops.dropout(pooled, config.hidden_dropout_prob, rng)
        scores, classifier_cache = ops.linear(pooled, w["classifier.weight"], w["classifier.bias"])
        return scores, (pooler_cache, dropout_cache, classifier_cache)

    def backward(self, dscores, cache, g):
        pooler_cache, dropout_cache, classifier_cache = cache
        dpooled, g["classifier.weight"][...], g["classifier.bias"][...] = ops.linear_backward(dscores, classifier_cache)
        return super().backward(ops.dropout_backward(dpooled, dropout_cache), pooler_cache, g)


class Regression(Classification):
    """num_labels numbers for each sequence, (B, C), under the mean squared error; labels (B, C), or (B,) if C = 1."""

    loss = staticmethod(ops.squared_error)
    loss_backward = staticmethod(ops.squared_error_backward)

    def targets(self, labels):
        return labels.reshape(len(labels), -1)

    def check(self, labels, ids, config):
        shape = (len(ids), config.num_labels)
        if labels.shape != shape and (labels.shape != shape[:1] or config.num_labels > 1):
            raise ValueError(f"labels: expected the shape {shape} for ids of shape {ids.shape}, got {labels.shape}")
        if labels.dtype.kind not in "iuf" or not np.isfinite(labels.min()) or not np.isfinite(labels.max()):
            raise ValueError(f"labels: expected finite numbers, got {labels.dtype} of shape {labels.shape}")


class MultipleChoice(Classification):
    """Scores of C choices, (B, C), for ids (B, C, L); labels (B,)."""

    def outputs(self, config):
        return 1

    def expected(self, ids, config):
        return ids.shape[:1], ids.shape[1]

    def forward(self, x, w, config, ids, rng=None):
        scores, cache = super().forward(x, w, config, ids, rng)
        return scores.reshape(ids.shape[:2]), cache

    def backward(self, dscores, cache, g):
        return super().backward(dscores.reshape(-1, 1), cache, g)


# ---- spans ----------------------------------------------------------------------------------------------------------


class Span(Head):
    """Scores of every token to be the answer's first and its last, (B, 2, L); labels (B, 2)."""

    def shapes(self, config):
        return {"qa_outputs.weight": (2, config.hidden_size), "qa_outputs.bias": (2,)}

    def positions(self, ids, labels=None):
        return slice(None)

    def expected(self, ids, config):
        return (len(ids), 2), ids.shape[-1]

    def forward(self, x, w, config, ids, rng=None):
        y, cache = ops.linear(x, w["qa_outputs.weight"], w["qa_outputs.bias"])
        return y.reshape(*ids.shape, 2).swapaxes(-1, -2), cache

    def backward(self, dscores, cache, g):
        dx, g["qa_outputs.weight"][...], g["qa_outputs.bias"][...] = ops.linear_backward(
            dscores.swapaxes(-1, -2).reshape(-1, 2), cache
        )
        return dx


def value_range(values):
    """Least and largest, as an error message shows them."""
    return f"{int(values.min())}..{int(values.max())}"


HEADS = {
    ("bert", "lm"): MaskedLM(),
    ("bert", "none"): Pooler(),
    ("bert", "classification"): Classification(),
    ("bert", "regression"): Regression(),
    ("bert", "multiple_choice"): MultipleChoice(),
    ("bert", "span"): Span(),
    ("gpt2", "lm"): CausalLM(),
}
