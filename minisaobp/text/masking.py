"""BERT's masked-language-model task: which tokens are hidden, and behind what."""

import numpy as np

from .batches import Batch

IGNORED = -100  # the label of a token that is not asked for


def mask_tokens(ids, special, vocab_size, rng):
    """Inputs and labels, both of the shape of ids (N, L), for masked language modelling as in the original BERT.

    15% of the ordinary tokens of each sequence, at least one, are asked for: their label is the token, every other
    label is -100. Of these, 80% are shown as [MASK], 10% as a random ordinary token and 10% as they are. special:
    SpecialTokens; every other token is ordinary.
    """
    ordinary = ~np.isin(ids, special)
    wanted = np.where(ordinary.any(axis=1), np.maximum(1, np.rint(0.15 * ordinary.sum(axis=1))), 0)
    lottery = np.where(ordinary, rng.random(ids.shape), np.inf)
    asked = lottery.argsort(axis=1).argsort(axis=1) < wanted[:, None]
    shown_as = rng.random(ids.shape)
    inputs = np.where(asked & (shown_as < 0.8), special.mask, ids)
    random_tokens = rng.choice(np.setdiff1d(np.arange(vocab_size), special), ids.shape)
    inputs = np.where(asked & (shown_as >= 0.9), random_tokens, inputs)
    return inputs, np.where(asked, ids, IGNORED)


def masking(special, vocab_size):
    """A function (batch, rng) -> batch that masks its ids, for `Batches`."""

    def mask(batch, rng):
        inputs, labels = mask_tokens(batch.ids, special, vocab_size, rng)
        return Batch(inputs, labels, *batch[2:])

    return mask
