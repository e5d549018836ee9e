"""BERT's masked-language-model task: which tokens are hidden, and behind what."""

import numpy as np

from .tokenizer import MASK, SPECIAL

IGNORED = -100  # the label of a token that is not asked for


def mask_tokens(ids, vocab_size, rng):
    """Inputs and labels, both of the shape of ids (N, L), for masked language modelling as in the original BERT.

    15% of the ordinary tokens of each sequence, at least one, are asked for: their label is the token, every other
    label is -100. Of these, 80% are shown as [MASK], 10% as a random ordinary token and 10% as they are.
    """
    ordinary = ids >= len(SPECIAL)
    wanted = np.where(ordinary.any(axis=1), np.maximum(1, np.rint(0.15 * ordinary.sum(axis=1))), 0)
    lottery = np.where(ordinary, rng.random(ids.shape), np.inf)
    asked = lottery.argsort(axis=1).argsort(axis=1) < wanted[:, None]
    shown_as = rng.random(ids.shape)
    inputs = np.where(asked & (shown_as < 0.8), MASK, ids)
    random_tokens = rng.integers(len(SPECIAL), vocab_size, ids.shape)
    inputs = np.where(asked & (shown_as >= 0.9), random_tokens, inputs)
    return inputs, np.where(asked, ids, IGNORED)


def masked_batches(ids, valid, batch, vocab_size, rng):
    """Endless (inputs, labels, valid) batches: every sequence once per pass in random order, masked anew each time."""
    order = np.empty(0, int)
    while True:
        while len(order) < batch:
            order = np.concatenate((order, rng.permutation(len(ids))))
        rows, order = order[:batch], order[batch:]
        yield *mask_tokens(ids[rows], vocab_size, rng), valid[rows]
