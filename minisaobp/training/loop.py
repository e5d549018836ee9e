"""The one loop that trains every model on every objective, and the evaluation of what it made."""

import dataclasses
import math
import time

import numpy as np

from ..backend import array_namespace, generator
from .adamw import AdamW, clip_to_norm, cosine_with_warmup

LOOK_EVERY = 50  # steps of a GPU between two looks at its loss
DROPOUT = 3  # what the seed is used for here; 1 and 2 are the batches' (text/batches.py)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train: AdamW, learning rate linear up to peak_rate over `warmup` steps, then down a cosine."""

    steps: int
    batch: int  # examples that go through the model at a time
    peak_rate: float
    warmup: int = 0
    accumulate: int = 1  # batches whose gradients are added up for one step
    max_norm: float = 1.0  # of the gradient, which is scaled down to it
    weight_decay: float = 0.01  # of matrices; vectors have none
    seed: int = 0  # of dropout


def train(model, batches, settings, optimiser):
    """Train in place; yields (loss, seconds) after each step, from step optimiser.steps on.

    On a GPU nobody waits for the step: the loss is an array of one number that may not be there yet, and the seconds
    are those until the next step can be asked for.

    batches: an object whose batch(number, size) is a Batch; step s takes the numbers s * accumulate and following.
    The loss is the mean over all labels of the step, in nats (of a regression the mean squared error). Everything that
    is drawn depends on the seed and the step alone, so a run continued from weights and optimiser goes on bit for bit.
    Raises FloatingPointError where loss or gradient are not finite; the weights are then those of the step before. On a
    GPU, where one looks at every LOOK_EVERY-th step, the steps since the first such one have spoilt them.
    """
    weights = model.parameters.flat
    for step in range(optimiser.steps, settings.steps):
        started = time.perf_counter()
        loss, gradient = _loss_and_gradient(model, batches, settings, step)
        norm = clip_to_norm(gradient, settings.max_norm)
        # on a GPU to look means to wait, so one looks now and then, and before anything is written
        looks = array_namespace(weights) is np or (step + 1) % LOOK_EVERY == 0
        if looks and not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"training diverges, lower the learning rate: step {step + 1} has loss {float(loss):g} and a gradient "
                f"of length {float(norm):g}"
            )
        rate = cosine_with_warmup(step, settings.steps, settings.peak_rate, settings.warmup)
        optimiser.update(weights, gradient, rate)
        yield float(loss) if array_namespace(weights) is np else loss, time.perf_counter() - started


def _loss_and_gradient(model, batches, settings, step):
    """Loss and flat gradient of one step, both means over the labels of all its batches together."""
    losses, gradients, counts = [], None, []
    for number in range(step * settings.accumulate, (step + 1) * settings.accumulate):
        batch = batches.batch(number, settings.batch)
        rng = generator(array_namespace(model.parameters.flat), settings.seed, DROPOUT, number)
        loss, gradient = model.loss_and_gradients(*batch, rng=rng)
        if settings.accumulate == 1:
            return loss, gradient.flat
        counts.append(model.head.targets(batch.labels).size)
        losses.append(loss * counts[-1])
        gradient.flat *= counts[-1]
        if gradients is None:
            gradients = gradient.flat
        else:
            gradients += gradient.flat
    gradients /= sum(counts)
    return sum(losses) / sum(counts), gradients


def optimiser_for(model, settings):
    return AdamW.for_parameters(model.parameters, weight_decay=settings.weight_decay)


@dataclasses.dataclass
class Score:
    """Over all labels: mean loss (nats, or squared error), its exponential, and the share guessed right."""

    loss: float
    accuracy: float | None  # None of a regression
    labels: int

    @property
    def perplexity(self):
        """None of a regression; at most e^700, which a float can hold."""
        return None if self.accuracy is None else math.exp(min(self.loss, 700.0))

    def perplexity_per(self, units):
        """Of a causal model, whose labels are all tokens of a text: the perplexity per word, if `units` are its words.

        WikiText reports it so: the whole loss in nats over the number of words, line ends included.
        """
        return math.exp(min(self.loss * self.labels / units, 700.0))


def evaluate_from_prefixes(model, batch):
    """Score of a decoder on the sequences of a Batch, each token predicted by a forward of what comes before it alone.

    Looking ahead is of no use here; for a causal model it is the Score of `evaluate`, to rounding.
    """
    total, right, count = 0.0, 0, 0
    for length in range(1, batch.ids.shape[1]):
        scores = model.logits(batch.ids[:, :length])[:, -1].astype(np.float64)
        targets = array_namespace(scores).asarray(batch.labels[:, length])
        asked = targets >= 0
        loss, _ = model.head.loss(scores[asked], targets[asked])
        number = int(asked.sum())
        total, count = total + float(loss) * number, count + number
        right += int((scores.argmax(axis=-1) == targets)[asked].sum())
    return Score(total / count, right / count, count)


def evaluate(model, batches):
    """Score of the model on an iterable of Batch."""
    total, right, count = 0.0, 0, 0
    for batch in batches:
        scores, targets = model.scored(*batch)
        loss, _ = model.head.loss(scores.astype(np.float64), targets)
        total += float(loss) * targets.size
        count += targets.size
        if targets.ndim == 1:
            right += int((scores.argmax(axis=-1) == targets).sum())
    if not count:
        raise ValueError("batches: expected at least one, got none")
    return Score(total / count, right / count if targets.ndim == 1 else None, count)
