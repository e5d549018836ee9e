"""Tokens, by the `tokenizers` library: WordPiece for encoders, byte-level BPE for decoders; and documents packed
into sequences of one length.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

END_OF_TEXT = "<|endoftext|>"


class SpecialTokens(NamedTuple):
    """Ids of WordPiece's tokens that stand for no text; those of `train_wordpiece` are the defaults."""

    pad: int = 0
    unk: int = 1
    cls: int = 2
    sep: int = 3
    mask: int = 4

    @classmethod
    def of(cls, tokenizer):
        """Those of a tokenizer. Raises ValueError that names one it does not have."""
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        if None in ids.values():
            missing = ", ".join(token for token, n in ids.items() if n is None)
            raise ValueError(f"expected a tokenizer with {' '.join(SPECIAL)}, this one has no {missing}")
        return cls(*ids.values())


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece(documents, vocab_size):
    """A lower-casing WordPiece tokenizer with at most vocab_size pieces, trained on (name, text) documents.

    The same documents always give the same pieces. The library's trainer alone does not: it numbers the continuing
    characters ("##a") in the order of a hash table and breaks ties by number. So they are numbered here beforehand,
    and of a text in very many scripts only the most frequent characters are kept, up to half of the vocabulary.
    """
    normalise, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = Counter(word for _, text in documents for line in text.splitlines() for word, _ in split(normalise(line)))
    counts = Counter()
    for word, times in words.items():
        for character in word:
            counts[character] += times
    alphabet = sorted(counts, key=lambda character: (-counts[character], character))[: vocab_size // 4]
    rare = set(counts) - set(alphabet)
    words = Counter({word: times for word, times in words.items() if rare.isdisjoint(word)})
    continuing = sorted({"##" + character for word in words for character in word[1:]})

    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL + continuing, show_progress=False)
    tokenizer.train_from_iterator(words.elements(), trainer)

    # the same pieces without the marks of a special token, which would match "##a" in a text as it stands
    tokenizer = Tokenizer(WordPiece(tokenizer.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_bpe(documents, vocab_size):
    """A byte-level BPE tokenizer, as GPT-2's, with at most vocab_size pieces; id 0 is <|endoftext|>.

    Every text can be written with it, and decoding gives the text back. The same documents give the same pieces.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in documents), trainer)
    return tokenizer


def load_tokenizer(directory):
    """The tokenizer of a model's directory: tokenizer.json, or BERT's vocab.txt, or GPT-2's vocab.json and merges.txt.

    Raises ValueError that names the file.
    """
    directory = Path(directory)
    try:
        if (directory / "tokenizer.json").exists():
            path = directory / "tokenizer.json"
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()  # the whole text counts, whatever the file was saved with
            tokenizer.no_padding()
            return tokenizer
        if (directory / "vocab.txt").exists():
            path = directory / "vocab.txt"
            words = path.read_text(encoding="utf-8").splitlines()
            tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
            tokenizer.normalizer = BertNormalizer(lowercase=_lower_case(directory))
            tokenizer.pre_tokenizer, tokenizer.decoder = BertPreTokenizer(), decoders.WordPiece()
            return tokenizer
        path = directory / "vocab.json"
        if path.exists():
            tokenizer = Tokenizer(BPE.from_file(str(path), str(directory / "merges.txt")))
            tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
            return tokenizer
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer ({error})") from None
    raise ValueError(f"{directory} has no tokenizer: expected tokenizer.json, vocab.txt or vocab.json with merges.txt")


def _lower_case(directory):
    """What tokenizer_config.json says; BERT's default is to lower-case."""
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text()).get("do_lower_case", True))
    except (OSError, ValueError, AttributeError):
        return True


def pack(documents, tokenizer, length):
    """Sequences [CLS] tokens [SEP] of one length: ids (N, length) int64 and valid (N, length) booleans.

    A sequence never spans two documents; the last one of each document is filled up with [PAD], where valid is False.
    """
    special, room = SpecialTokens.of(tokenizer), length - 2
    rows = []
    for encoding in tokenizer.encode_batch([text for _, text in documents], add_special_tokens=False):
        rows += [encoding.ids[a : a + room] for a in range(0, len(encoding.ids), room)]
    ids = np.full((len(rows), length), special.pad)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens) + 2] = [special.cls, *tokens, special.sep]
    return ids, ids != special.pad


def pack_stream(documents, tokenizer, length):
    """Sequences of one length from all documents in a row, <|endoftext|> after each, as GPT-2 is trained: ids
    (N, length) int64 and valid (N, length) booleans, False only at the end of the last one.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"expected a tokenizer with {END_OF_TEXT}, this one has none")
    encodings = tokenizer.encode_batch([text for _, text in documents], add_special_tokens=False)
    stream = np.array([token for encoding in encodings for token in (*encoding.ids, end)])
    count = -(-len(stream) // length)
    ids = np.full(count * length, end)
    ids[: len(stream)] = stream
    return ids.reshape(count, length), (np.arange(count * length) < len(stream)).reshape(count, length)
