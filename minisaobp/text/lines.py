"""Lines of UTF-8 files, plain, .gz or .xz. What is wrong with one is said by file, line number and reason."""

import gzip
import itertools
import lzma
import os
import zlib

MAX_LINE = 10_000_000  # bytes; a longer line is a damaged file or another format
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)  # what unpacking such a file raises
OPENERS = {".gz": gzip.open, ".xz": lzma.open}


class BadLine(ValueError):
    """What is wrong with a line, without its file and number; `kind` is what such lines are counted under."""

    def __init__(self, kind, reason):
        super().__init__(reason)
        self.kind = kind


def refuse(path, number, bad, skipped):
    """Count a BadLine in the Counter `skipped`, or, if that is None, raise ValueError with file, line and reason."""
    if skipped is None:
        raise ValueError(f"{path}, line {number}: {bad}") from None
    skipped[bad.kind] += 1


def lines_of(path, skipped=None):
    """(number, line) of every line, counted from 1, the lines with their ends.

    A byte-order mark is no part of the text and CR LF is an LF. Raises ValueError if the file cannot be read or
    unpacked, or if a line is not UTF-8 or longer than MAX_LINE; with a Counter `skipped` such lines are counted.
    """
    number = 0
    try:
        with opened(path) as file:
            for number in itertools.count(1):
                raw = file.readline(MAX_LINE + 1)
                if not raw:
                    return
                try:
                    line = _decoded(raw, number, file)
                except BadLine as bad:
                    refuse(path, number, bad, skipped)
                else:
                    yield number, line
    except DAMAGED as error:
        raise ValueError(f"{path}, line {max(number, 1)}: cannot be unpacked, damaged or cut off ({error})") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def opened(path):
    """The file's bytes, unpacked. Raises ValueError if there is no such file."""
    if not os.path.isfile(path):
        reason = "not a file" if os.path.exists(path) else "no such file"
        raise ValueError(f"{path} cannot be read ({reason})")
    return OPENERS.get(os.path.splitext(path)[1], open)(path, "rb")


def _decoded(raw, number, file):
    if len(raw) > MAX_LINE:
        while raw and not raw.endswith(b"\n"):  # the rest of it
            raw = file.readline(MAX_LINE)
        raise BadLine("too long", f"longer than {MAX_LINE / 1e6:g} MB, expected lines of text")
    if number == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    if raw.endswith(b"\r\n"):
        raw = raw[:-2] + b"\n"
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8", f"not UTF-8 (byte {error.start + 1}: {error.reason})") from None
