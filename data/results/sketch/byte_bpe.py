"""Byte-level BPE, cased, in place of lower-casing WordPiece, for this study alone. WikiText's <unk> stays [UNK], which
nobody is asked for.
"""

import contextlib
from unittest import mock

from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from minisaobp.text import dataset
from minisaobp.text.corpora import UNKNOWN
from minisaobp.text.tokenizer import SPECIAL


def train_bpe(documents, vocab_size):
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.replace(UNKNOWN, "") for _, text in documents), trainer)
    return tokenizer


@contextlib.contextmanager
def patched():
    with mock.patch.object(dataset, "train_wordpiece", train_bpe):
        yield
