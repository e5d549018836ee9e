"""Tokens of a corpus, in memory or in a memory-mapped file: tokenised once, used by every run that asks for the same.

A token file is a folder named by a hash of its text and its tokenizer, so that a stale one is never used:

    tokens.bin          the ids, uint16 or, of a vocabulary above 65,536, uint32, in the machine's byte order
    ends.npy            where each document ends, int64
    description.json    how many there are, and from what
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..files import umask, write_json
from .tokenizer import encoded

FORMAT = 1  # part of the hash: another layout or another way to tokenise is another file


class Tokens(NamedTuple):
    """Documents as one array of ids."""

    ids: Any  # (T,) integers
    ends: Any  # (documents,) the place in ids where each document ends

    @property
    def starts(self):
        return np.concatenate([[0], self.ends[:-1]])


def tokens_of(documents, tokenizer, end=None):
    """Tokens of (name, text) documents, in memory. end: as of `encoded`."""
    pieces, places, count = [np.empty(0, np.uint32)], [], 0
    for ids, last in encoded(documents, tokenizer, end):
        pieces.append(ids)
        count += len(ids)
        if last:
            places.append(count)
    return Tokens(np.concatenate(pieces), np.array(places, np.int64))


def token_file(folder, corpus, tokenizer, end=None):
    """Tokens of a Corpus, memory-mapped from a token file in `folder`, which is made if it is not there.

    The file is written beside and renamed: it is whole or not there at all. Raises ValueError if it was damaged since.
    """
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)
    asked = [FORMAT, corpus.fingerprint, tokenizer.to_str(), end, dtype.name, sys.byteorder]
    place = Path(folder) / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    if not place.exists():
        os.makedirs(folder, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder, prefix=place.name, suffix=".part"))
        try:
            count, documents = _write(beside, corpus, tokenizer, end, dtype)
            about = {"sources": list(corpus.names), "dtype": dtype.name, "tokens": count, "documents": documents}
            write_json(beside / "description.json", about)
            os.chmod(beside, 0o777 & ~umask())  # mkdtemp's folders are for the owner only
            os.rename(beside, place)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if not (isinstance(error, OSError) and place.exists()):  # another run has made the same meanwhile
                raise
    try:
        count = json.loads((place / "description.json").read_text(encoding="utf-8"))["tokens"]
        ids = np.memmap(place / "tokens.bin", dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
        return Tokens(ids, np.load(place / "ends.npy", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place} is damaged, delete it to have it made again ({error})") from None


def _write(place, corpus, tokenizer, end, dtype):
    ends, count = [], 0
    with open(place / "tokens.bin", "wb") as file:
        for ids, last in encoded(corpus, tokenizer, end):
            file.write(ids.astype(dtype).tobytes())
            count += len(ids)
            if last:
                ends.append(count)
        file.flush()
        os.fsync(file.fileno())
    np.save(place / "ends.npy", np.array(ends, np.int64))
    return count, len(ends)
