"""Text made ready for a language model: tokenised, packed, with a part held out."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from .batches import Batch, Batches, in_order
from .corpora import python_documentation, text_files
from .masking import IGNORED, masking
from .tokenizer import SpecialTokens, pack, pack_stream, train_bpe, train_wordpiece

HELD_OUT_MASKS = 4  # how often the held-out text is masked, each time elsewhere: more targets, less noise


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Sequences of tokens for a masked or a causal language model, with the labels of `examples_of`."""

    source: str
    documents: tuple  # (name, text) pairs of the training side, and of the held-out
    tokenizer: Any
    causal: bool
    training: Batch
    held_out: Batch

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
        digest = hashlib.sha256()
        for side in self.documents:
            for _, text in side:
                digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def summary(self):
        """What a record says of the text, JSON."""
        return {
            "source": self.source,
            "training_characters": sum(len(text) for _, text in self.documents[0]),
            "held_out_characters": sum(len(text) for _, text in self.documents[1]),
            "held_out": [name for name, _ in self.documents[1]],
            "vocabulary": self.vocabulary,
            "training_sequences": len(self.training.ids),
            "held_out_sequences": len(self.held_out.ids),
        }


def read_dataset(corpus, causal, length, vocab_size=None, tokenizer=None):
    """The Dataset of the UTF-8 files `corpus`, or of Python's own documentation if that is None.

    A tokenizer with at most vocab_size pieces is trained on the training part unless one is given. Raises ValueError
    if a file cannot be read, or if one side has less text than one sequence of `length` tokens.
    """
    training, held_out = text_files(corpus) if corpus else python_documentation()
    if tokenizer is None:
        tokenizer = (train_bpe if causal else train_wordpiece)(training, vocab_size)
    sides = []
    for what, documents in (("training", training), ("held-out", held_out)):
        examples = examples_of(documents, tokenizer, causal, length)
        tokens, room = int((examples.labels != IGNORED).sum()), length if causal else length - 2
        if tokens < room:
            between = "" if causal else f" ({room} tokens between [CLS] and [SEP])"
            raise ValueError(
                f"the {what} text has {tokens} tokens, shorter than one sequence of --length {length}{between}"
            )
        sides.append(examples)
    return Dataset(
        source=", ".join(map(str, corpus)) if corpus else "the Python language reference (pydoc_data.topics)",
        documents=(training, held_out),
        tokenizer=tokenizer,
        causal=causal,
        training=sides[0],
        held_out=sides[1],
    )


def examples_of(documents, tokenizer, causal, length):
    """(name, text) documents as a Batch of sequences; a label is the token itself, -100 where it stands for no text.

    Sequences without anything to predict, a last token alone or nothing but [UNK], are left out.
    """
    ids, valid = (pack_stream if causal else pack)(documents, tokenizer, length)
    text = valid if causal else ~np.isin(ids, SpecialTokens.of(tokenizer))
    predicted = text[:, 1:] if causal else text  # nothing predicts the first token of a causal sequence
    return Batch(ids, np.where(text, ids, IGNORED), valid).rows(predicted.any(axis=1))


def held_out_batches(examples, tokenizer, causal, size):
    """Batches of at most that size to evaluate on, as a list: four maskings of each for a masked model."""
    batches = in_order(examples, size)
    if causal:
        return batches
    mask, rng = masking(SpecialTokens.of(tokenizer), tokenizer.get_vocab_size()), np.random.default_rng(0)
    return [mask(batch, rng) for _ in range(HELD_OUT_MASKS) for batch in batches]
