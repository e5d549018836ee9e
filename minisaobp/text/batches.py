"""Examples and batches of them. Every draw is a function of the seed and the batch's number alone: a run that was
stopped goes on anywhere with nothing but a number to remember.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

ORDER, DRAWS = 1, 2  # what a seed is used for, so that no two uses share a stream of random numbers


class Batch(NamedTuple):
    """The arguments of a model's loss: arrays of one length along their first axis, or None."""

    ids: Any  # (B, L) integers, or (B, C, L) with C choices
    labels: Any  # (B, L), (B,) or (B, 2)
    attention_mask: Any = None  # as ids; 0 or False for padding
    token_type_ids: Any = None  # as ids

    @property
    def count(self):
        """How many examples."""
        return len(self.ids)

    def rows(self, which):
        """The same of these examples only."""
        return Batch(*(None if array is None else array[which] for array in self))


class Batches:
    """Batches without end: every example once per pass, in an order of its own each time.

    examples: a Batch, or what else has a `count` and gives a Batch of `rows(which)`: it may make them on demand.
    prepare(batch, rng) makes of the examples what is trained on, for masking; None leaves them as they are.
    """

    def __init__(self, examples, seed, prepare=None):
        self.examples, self.seed, self.prepare = examples, seed, prepare

    def batch(self, number, size):
        """The batch of that number, counted from 0, for batches of that size."""
        count = self.examples.count
        places = np.arange(number * size, (number + 1) * size)
        rows = np.empty(size, int)
        for turn in np.unique(places // count):
            here = places // count == turn
            rows[here] = _order(count, self.seed, int(turn))[places[here] % count]
        batch = self.examples.rows(rows)
        if self.prepare is None:
            return batch
        return self.prepare(batch, np.random.default_rng([self.seed, DRAWS, number]))


@functools.lru_cache(maxsize=2)  # a batch spans two passes at most, if it is smaller than one
def _order(count, seed, turn):
    return np.random.default_rng([seed, ORDER, turn]).permutation(count)


def in_order(examples, size):
    """Every example once, in batches of at most that size."""
    return [examples.rows(slice(a, a + size)) for a in range(0, examples.count, size)]
