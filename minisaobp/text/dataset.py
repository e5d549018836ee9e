"""Text made ready for a language model: tokenised, packed, with a part held out."""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from .batches import Batch, Batches, in_order
from .corpora import python_documentation, text_files, whole_files
from .masking import masking
from .packing import CausalSequences, MaskedSequences, end_of_text
from .token_file import token_file, tokens_of
from .tokenizer import SpecialTokens, encoded, train_bpe, train_wordpiece

HELD_OUT_MASKS = 4  # how often the held-out text is masked, each time elsewhere: more targets, less noise


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Sequences of tokens for a masked or a causal language model, with the labels of `packing.py`."""

    source: str
    documents: tuple  # the training Corpus and the held-out
    tokenizer: Any
    causal: bool
    length: int  # of a sequence
    held_out: Batch
    token_folder: Any = None  # for the training side's token file; None keeps its tokens in memory

    @functools.cached_property
    def training(self):
        """MaskedSequences or CausalSequences; the text is tokenised when they are first asked for.

        Raises ValueError if the token file was damaged, OSError if it cannot be written.
        """
        end = end_of_text(self.tokenizer) if self.causal else None
        if self.token_folder is None:
            ids = tokens_of(self.documents[0], self.tokenizer, end)
        else:
            ids = token_file(self.token_folder, self.documents[0], self.tokenizer, end)
        return (CausalSequences if self.causal else MaskedSequences)(ids, self.tokenizer, self.length)

    @property
    def vocabulary(self):
        return self.tokenizer.get_vocab_size()

    @property
    def special(self):
        """SpecialTokens of a masked model, none of a causal one: its <|endoftext|> is predicted like any token."""
        return () if self.causal else SpecialTokens.of(self.tokenizer)

    def batches(self, seed):
        """Training batches without end."""
        return Batches(self.training, seed, None if self.causal else masking(self.special, self.vocabulary))

    def held_out_batches(self, size):
        """The held-out text as a list of Batch, the same for every seed; masked four times if it is to be masked."""
        return held_out_batches(self.held_out, self.tokenizer, self.causal, size)

    @property
    def fingerprint(self):
        """A hash of the text: whether two runs read the same."""
        return hashlib.sha256("".join(side.fingerprint for side in self.documents).encode()).hexdigest()

    @property
    def summary(self):
        """What a record says of the text, JSON."""
        return {
            "source": self.source,
            "training_characters": self.documents[0].characters,
            "held_out_characters": self.documents[1].characters,
            "held_out": list(self.documents[1].names),
            "held_out_words": self.documents[1].words(),
            "vocabulary": self.vocabulary,
            "training_documents": self.training.documents,
            "training_documents_cut": self.training.documents_cut,
            "training_sequences": self.training.count,
            "held_out_sequences": self.held_out.count,
        }


def read_dataset(corpus, causal, length, vocab_size=None, tokenizer=None, held_out=None, token_folder=None):
    """The Dataset of the UTF-8 files `corpus`, or of Python's own documentation if that is None.

    A tokenizer with at most vocab_size pieces is trained on the training part unless one is given. held_out: files to
    evaluate on (default: the last tenth of each). token_folder: where the training side's tokens go into a file, which
    is memory-mapped; None keeps them in memory. Raises ValueError if a file cannot be read, or if one side has less
    text than one sequence of `length` tokens.
    """
    if held_out is not None and corpus is None:
        raise ValueError("held-out files are those of a corpus of files: expected one")
    if held_out is not None:
        sides = whole_files(corpus), whole_files(held_out)
    else:
        sides = text_files(corpus) if corpus else python_documentation()
    if tokenizer is None:
        tokenizer = (train_bpe if causal else train_wordpiece)(sides[0], vocab_size)
    for what, side in zip(("training", "held-out"), sides, strict=True):
        _check_length(what, side, tokenizer, causal, length)
    return Dataset(
        source=", ".join(map(str, corpus)) if corpus else "the Python language reference (pydoc_data.topics)",
        documents=sides,
        tokenizer=tokenizer,
        causal=causal,
        length=length,
        held_out=examples_of(sides[1], tokenizer, causal, length),
        token_folder=token_folder,
    )


def _check_length(what, side, tokenizer, causal, length):
    """Raise ValueError if the documents have fewer tokens than one sequence; looks no further than it must."""
    special = () if causal else SpecialTokens.of(tokenizer)
    room, count = (length - 1, -1) if causal else (length - 2, 0)
    for ids, _ in encoded(side, tokenizer, end_of_text(tokenizer) if causal else None):
        count += int((~np.isin(ids, special)).sum())
        if count >= room:
            return
    between = "" if causal else f" ({room} tokens between [CLS] and [SEP])"
    raise ValueError(
        f"the {what} text has {max(count, 0)} tokens, shorter than one sequence of --length {length}{between}"
    )


def examples_of(documents, tokenizer, causal, length):
    """(name, text) documents as a Batch of sequences in memory; see `packing.py` for what they are."""
    if causal:
        sequences = CausalSequences(tokens_of(documents, tokenizer, end_of_text(tokenizer)), tokenizer, length)
    else:
        sequences = MaskedSequences(tokens_of(documents, tokenizer), tokenizer, length)
    return sequences.rows(np.arange(sequences.count))


def held_out_batches(examples, tokenizer, causal, size):
    """Batches of at most that size to evaluate on, as a list: four maskings of each for a masked model."""
    batches = in_order(examples, size)
    if causal:
        return batches
    mask, rng = masking(SpecialTokens.of(tokenizer), tokenizer.get_vocab_size()), np.random.default_rng(0)
    return [mask(batch, rng) for _ in range(HELD_OUT_MASKS) for batch in batches]
