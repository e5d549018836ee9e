"""Training and evaluating a masked language model."""

import dataclasses
import math
import time

import numpy as np

from ..text.masking import IGNORED
from .adamw import AdamW, clip_to_norm, cosine_with_warmup


def train(model, batches, *, steps, peak_rate, warmup, max_norm=1.0, weight_decay=0.01):
    """Train in place on (ids, labels, valid) batches; yields (loss in nats, seconds) after each of `steps` steps."""
    optimiser = AdamW.for_parameters(model.parameters, weight_decay=weight_decay)
    for step in range(steps):
        started = time.perf_counter()
        loss, gradients = model.loss_and_gradients(*next(batches))
        clip_to_norm(gradients.flat, max_norm)
        optimiser.update(model.parameters.flat, gradients.flat, cosine_with_warmup(step, steps, peak_rate, warmup))
        yield float(loss), time.perf_counter() - started


@dataclasses.dataclass
class Score:
    """Over all labelled tokens: mean loss in nats, its exponential, and the share guessed right."""

    loss: float
    accuracy: float
    tokens: int

    @property
    def perplexity(self):
        return math.exp(self.loss)


def evaluate(model, batches):
    """Score of the model on (ids, labels, valid) batches."""
    total, right, tokens = 0.0, 0, 0
    for ids, labels, valid in batches:
        chosen = labels != IGNORED
        logits = model.logits_where(ids, chosen, valid).astype(np.float64)
        wanted = labels[chosen]
        top = logits.max(axis=-1)
        log_total = top + np.log(np.exp(logits - top[:, None]).sum(axis=-1))
        total += float((log_total - logits[np.arange(len(wanted)), wanted]).sum())
        right += int((logits.argmax(axis=-1) == wanted).sum())
        tokens += len(wanted)
    return Score(total / tokens, right / tokens, tokens)
