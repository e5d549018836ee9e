"""WordPiece tokens, trained by the `tokenizers` library, and documents packed into sequences of one length."""

from collections import Counter

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # their ids are 0 to 4
PAD, UNK, CLS, SEP, MASK = range(5)


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
    return tokenizer


def pack(documents, tokenizer, length):
    """Sequences [CLS] tokens [SEP] of one length: ids (N, length) int64 and valid (N, length) booleans.

    A sequence never spans two documents; the last one of each document is filled up with [PAD], where valid is False.
    """
    room = length - 2
    rows = []
    for encoding in tokenizer.encode_batch([text for _, text in documents], add_special_tokens=False):
        rows += [encoding.ids[a : a + room] for a in range(0, len(encoding.ids), room)]
    ids = np.full((len(rows), length), PAD)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens) + 2] = [CLS, *tokens, SEP]
    return ids, ids != PAD
