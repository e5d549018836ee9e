"""Documents packed into sequences of one length, made when they are asked for: tokens may lie in a file."""

import numpy as np

from .batches import Batch
from .masking import IGNORED
from .tokenizer import END_OF_TEXT, SpecialTokens

CHUNK = 4096  # sequences looked at together


class MaskedSequences:
    """[CLS] tokens [SEP], filled up with [PAD]. A sequence never spans two documents.

    A document of more than length - 2 tokens goes on in the following sequences, and these fall into different batches:
    `documents_cut` says of how many documents that is so. Sequences of special tokens alone ([UNK]), in which there is
    nothing to predict, are left out.
    """

    def __init__(self, tokens, tokenizer, length):
        self.tokens, self.length, self.special = tokens, length, SpecialTokens.of(tokenizer)
        self.starts = tokens.starts
        sizes = tokens.ends - self.starts
        of_document = -(-sizes // (length - 2))
        self.before = np.cumsum(of_document) - of_document  # sequences before each document
        self.documents, self.documents_cut = len(sizes), int((of_document > 1).sum())
        self.kept = np.arange(of_document.sum())
        parts = [self.kept[a : a + CHUNK] for a in range(0, len(self.kept), CHUNK)]
        some = [(self.rows(np.arange(len(part)) + part[0]).labels != IGNORED).any(axis=1) for part in parts]
        self.kept = self.kept[np.concatenate([np.empty(0, bool), *some])]

    @property
    def count(self):
        return len(self.kept)

    def rows(self, which):
        """A Batch of these sequences; which: integers (n,). A label is the token itself, -100 of a special one."""
        which = self.kept[which]
        room = self.length - 2
        document = np.searchsorted(self.before, which, side="right") - 1
        start = self.starts[document] + (which - self.before[document]) * room
        stop = np.minimum(start + room, self.tokens.ends[document])
        places = start[:, None] + np.arange(room)
        text = places < stop[:, None]
        special = self.special
        ids = np.full((len(which), self.length), special.pad)
        ids[:, 0] = special.cls
        ids[:, 1:-1] = np.where(text, self.tokens.ids[np.where(text, places, 0)], special.pad)
        lengths = stop - start
        ids[np.arange(len(which)), lengths + 1] = special.sep
        valid = np.arange(self.length) < lengths[:, None] + 2
        return Batch(ids, np.where(np.isin(ids, special), IGNORED, ids), valid)


class CausalSequences:
    """All documents in a row, <|endoftext|> after each, as GPT-2 is trained: a sequence may span several documents.

    Each sequence begins with the last token of the one before it, the first with <|endoftext|>, so that every token is
    predicted exactly once. A document that does not fit into the rest of its sequence goes on in the next one, and the
    two fall into different batches: `documents_cut` says of how many documents that is so.
    """

    def __init__(self, tokens, tokenizer, length):
        self.tokens, self.length, self.end = tokens, length, end_of_text(tokenizer)
        self.documents = len(tokens.ends)
        self.count = -(-len(tokens.ids) // (length - 1))
        first, last = tokens.starts // (length - 1), (tokens.ends - 1) // (length - 1)
        self.documents_cut = int((last > first).sum())

    def rows(self, which):
        """A Batch of these sequences; which: integers (n,). A label is the token itself, -100 after the text's end."""
        places = np.asarray(which)[:, None] * (self.length - 1) - 1 + np.arange(self.length)
        valid = places < len(self.tokens.ids)
        text = valid & (places >= 0)
        ids = np.where(text, self.tokens.ids[np.where(text, places, 0)], self.end).astype(np.int64)
        return Batch(ids, np.where(valid, ids, IGNORED), valid)


def end_of_text(tokenizer):
    """The id of <|endoftext|>. Raises ValueError if the tokenizer has none."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"expected a tokenizer with {END_OF_TEXT}, this one has none")
    return end
