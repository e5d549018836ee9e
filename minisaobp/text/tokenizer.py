"""Tokens, by the `tokenizers` library: WordPiece for encoders, byte-level BPE for decoders."""

import itertools
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
from tqdm import tqdm

from .corpora import UNKNOWN

AT_A_TIME = 32  # pieces of text, which several cores share
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
    lines = (line for _, text in documents for line in text.replace(UNKNOWN, " ").splitlines())
    words = Counter(word for line in lines for word, _ in split(normalise(line)))
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
    tokenizer.train_from_iterator((text.replace(UNKNOWN, "<unk>") for _, text in documents), trainer)
    return tokenizer


def load_tokenizer(path):
    """The tokenizer in a model's directory, or a file of one: tokenizer.json, or BERT's vocab.txt, or GPT-2's
    vocab.json beside merges.txt.

    Raises ValueError that names the file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "vocab.txt", "vocab.json") if (path / name).exists()]
        if not found:
            expected = "tokenizer.json, vocab.txt or vocab.json with merges.txt"
            raise ValueError(f"{path} has no tokenizer: expected {expected}")
        path = found[0]
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".txt":
            words = path.read_text(encoding="utf-8").splitlines()
            tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
            tokenizer.normalizer = BertNormalizer(lowercase=_lower_case(path.parent))
            tokenizer.pre_tokenizer, tokenizer.decoder = BertPreTokenizer(), decoders.WordPiece()
            tokenizer.add_special_tokens([word for word in SPECIAL if word in words])  # as BERT reads them in a text
        elif (path.parent / "merges.txt").exists() and path.name == "vocab.json":
            tokenizer = Tokenizer(BPE.from_file(str(path), str(path.parent / "merges.txt")))
            tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        else:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_truncation()  # the whole text counts, whatever the file was saved with
            tokenizer.no_padding()
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path} cannot be read as a tokenizer ({error})") from None
    return tokenizer


def _lower_case(directory):
    """What tokenizer_config.json says; BERT's default is to lower-case."""
    try:
        return bool(json.loads((directory / "tokenizer_config.json").read_text()).get("do_lower_case", True))
    except (OSError, ValueError, AttributeError):
        return True


def encoded(documents, tokenizer, end=None):
    """Tokens of (name, text) documents, a piece at a time: (array of ids, whether the document ends with it).

    end: an id that is put after each document, or None. WikiText's <unk> is [UNK] where the tokenizer has one.
    """
    unk, ends = tokenizer.token_to_id("[UNK]"), [] if end is None else [end]
    pieces = _with_ends(documents)
    with tqdm(desc="tokens", unit=" characters", unit_scale=True, delay=2, leave=False) as bar:
        while batch := list(itertools.islice(pieces, AT_A_TIME)):
            parts = [text.split(UNKNOWN) if unk is not None else [text.replace(UNKNOWN, "<unk>")] for text, _ in batch]
            encodings = iter(tokenizer.encode_batch_fast(list(itertools.chain(*parts)), add_special_tokens=False))
            for (text, last), part in zip(batch, parts, strict=True):
                ids = next(encodings).ids
                for _ in part[1:]:
                    ids += [unk, *next(encodings).ids]
                bar.update(len(text))
                yield np.array(ids + ends if last else ids, np.uint32), last


def _with_ends(documents):
    """(text, whether the document ends with it) of (name, text) pairs."""
    before = None
    for name, text in documents:
        if before is not None:
            yield before[1], before[0] != name
        before = name, text
    if before is not None:
        yield before[1], True
