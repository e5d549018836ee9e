"""Sequences begin anywhere in the running text, without [CLS] and [SEP] and across documents, for this study alone, as
programs made for decoders take them; the held-out text is cut without them too.
"""

import contextlib
from unittest import mock

import numpy as np

from minisaobp.text import dataset
from minisaobp.text.batches import DRAWS, Batch, Batches
from minisaobp.text.masking import IGNORED
from minisaobp.text.tokenizer import SpecialTokens


class RunningText:
    """All documents in a row, cut into sequences; the tokens after the last whole one are left out."""

    def __init__(self, tokens, tokenizer, length):
        self.ids, self.length, self.special = tokens.ids, length, SpecialTokens.of(tokenizer)
        self.count, self.documents, self.documents_cut = len(tokens.ids) // length, len(tokens.ends), len(tokens.ends)

    def rows(self, which):
        return self.beginning(which * self.length)

    def beginning(self, places):
        """A Batch of the sequences that begin at these tokens (n,)."""
        ids = self.ids[places[:, None] + np.arange(self.length)].astype(np.int64)
        return Batch(ids, np.where(np.isin(ids, self.special), IGNORED, ids), np.ones(ids.shape, bool))


class Crops(Batches):
    """Training batches of sequences from anywhere."""

    def batch(self, number, size):
        rng, text = np.random.default_rng([self.seed, DRAWS, number]), self.examples
        return self.prepare(text.beginning(rng.integers(0, len(text.ids) - text.length, size)), rng)


@contextlib.contextmanager
def patched():
    with mock.patch.multiple(dataset, MaskedSequences=RunningText, Batches=Crops):
        yield
