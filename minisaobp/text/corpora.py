"""Where text comes from and which part of it is held out.

A document is a (name, text) pair; a long one comes in pieces, as several pairs in a row with the same name. A corpus is
read line by line, as often as it is needed, and never held in memory.
"""

import dataclasses
import hashlib
import math
import re

import numpy as np

from .lines import lines_of

HELD_OUT = 0.1  # share of the characters
MOST_HELD_OUT = 4_000_000  # characters: as much as a held-out loss needs, however large the corpus
PIECE = 100_000  # characters of a document that are handled at a time, if lines allow it
UNKNOWN = "\ufdd0"  # WikiText's <unk>: a code point that Unicode keeps out of text (`tokenizer.py` reads it)

_HEADING = re.compile(r" ?= (?!=)(.*\S) (?<!= )= ?\n?")  # of the first level: an article's title
_JOINED = re.compile(r" @([-,.])@ ")
_UNK = re.compile(r"(?<!\S)<unk>(?!\S)")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, again and again."""

    parts: tuple  # iterables of (name, text)
    names: tuple  # of documents or files
    characters: int
    fingerprint: str  # a hash of the text

    def __iter__(self):
        for part in self.parts:
            yield from part

    def words(self):
        """Words and line ends, as WikiText counts what a perplexity per word is of: 217,646 in its validation file."""
        return sum(len(line.split()) + line.count("\n") for part in self.parts for line in _raw_lines(part))


@dataclasses.dataclass(frozen=True)
class TextFile:
    """The characters of one file from `start` up to `end`, as documents: the whole of it, or each article of WikiText.

    In WikiText an article begins at a heading of the first level, `= Title =` between empty lines. Its words `@-@`,
    `@,@` and `@.@` are joined to their neighbours again, and `<unk>` becomes UNKNOWN; all the rest stays.
    """

    path: str
    wikitext: bool = False
    start: int = 0
    end: float = math.inf

    def lines(self):
        """Lines as they are in the file, with their ends."""
        place = 0
        for _, line in lines_of(self.path):
            if place >= self.end:
                return
            part = line[max(self.start - place, 0) : int(min(self.end - place, len(line)))]
            place += len(line)
            if part:
                yield part

    def __iter__(self):
        name, text, articles = self.path, "", 0
        for title, line in self._titled():
            if title is not None:
                if text.strip():
                    yield name, text
                    text = ""
                articles += 1
                name = f"{self.path}, article {articles}: {title}"
            if len(text) + len(line) > PIECE and text.strip() and line.strip():
                # before the last space of a run: there no tokenizer of ours looks across, GPT-2's pattern included
                indent = len(line) - len(line.lstrip())
                cut = len(text) + indent - 1
                text += line
                yield name, text[:cut]
                text = text[cut:]
            else:
                text += line
        if text:
            yield name, text

    def _titled(self):
        """(title of the article that begins here or None, line) with WikiText's markup undone."""
        if not self.wikitext:
            yield from ((None, line) for line in self.lines())
            return
        before, lines = "", self.lines()
        line = next(lines, None)
        while line is not None:
            after = next(lines, None)
            heading = _HEADING.fullmatch(line)
            begins = heading and not before.strip() and not (after or "").strip()
            yield heading[1] if begins else None, _plain(line)
            before, line = line, after


def _plain(line):
    """A line of WikiText without its markup and the spaces around it."""
    body = line.rstrip("\n")
    return _UNK.sub(UNKNOWN, _JOINED.sub(r"\1", body)).strip(" ") + line[len(body) :]


def _raw_lines(part):
    return part.lines() if isinstance(part, TextFile) else (text for _, text in part)


def whole_files(paths):
    """UTF-8 files, plain, .gz or .xz, as a Corpus. Raises ValueError naming a file that cannot be read or is empty."""
    surveys = [_survey(str(path)) for path in paths]
    return _corpus([TextFile(path, wikitext) for path, wikitext, _, _ in surveys], surveys)


def text_files(paths):
    """UTF-8 files as training and held-out Corpus: the last tenth of each file is held out, of many less (at most
    MOST_HELD_OUT characters in all).

    The cut is at the next empty line, or else line's end, or else space, as long as half of the tenth remains. Errors
    as of `whole_files`.
    """
    surveys = [_survey(str(path)) for path in paths]
    share = min(HELD_OUT, MOST_HELD_OUT / sum(characters for _, _, characters, _ in surveys))
    training, held_out, sizes = [], [], [0, 0]
    for path, wikitext, characters, _ in surveys:
        cut = _cut(TextFile(path, wikitext), characters, share)
        training.append(TextFile(path, wikitext, 0, cut))
        held_out.append(TextFile(path, wikitext, cut))
        sizes = [sizes[0] + cut, sizes[1] + characters - cut]
    return tuple(_corpus(side, surveys, size) for side, size in zip((training, held_out), sizes, strict=True))


def _corpus(parts, surveys, characters=None):
    digest = "".join(digest for *_, digest in surveys) + "".join(f" {part.start} {part.end}" for part in parts)
    return Corpus(
        parts=tuple(parts),
        names=tuple(part.path for part in parts),
        characters=sum(size for _, _, size, _ in surveys) if characters is None else characters,
        fingerprint=hashlib.sha256(digest.encode()).hexdigest(),
    )


def _survey(path):
    """(path, whether it is WikiText, characters, hash) of a file, read once."""
    characters, wikitext, digest = 0, None, hashlib.sha256()
    for _, line in lines_of(path):
        characters += len(line)
        digest.update(line.encode())
        if wikitext is None and line.strip():
            wikitext = bool(_HEADING.fullmatch(line))
    if wikitext is None:
        raise ValueError(f"{path} is empty, expected text")
    return path, wikitext, characters, digest.hexdigest()


def _cut(file, characters, share):
    start, latest = int(characters * (1 - share)), int(characters * (1 - share / 2))
    text = "".join(dataclasses.replace(file, start=start, end=latest).lines())
    for separator in ("\n\n", "\n", " "):
        at = text.find(separator)
        if at >= 0:
            return start + at + len(separator)
    return start


# ---- a text that every Python has ----------------------------------------------------------------------------------


def python_documentation():
    """The Python language reference that CPython carries (pydoc_data.topics): training and held-out Corpus.

    About 465,000 characters in 79 topics, English prose with some grammar and code. Topics quote one another
    ("compound" holds all of "if", "while", "for"), so topics that share a paragraph of 80 characters or more stay on
    the same side, and whole groups are held out until a tenth of the text is. The split does not depend on a seed.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python carries no pydoc_data.topics: give a text of your own") from None
    groups = sorted(_quoting_groups(topics), key=lambda names: names[0])
    order = np.random.default_rng(0).permutation(len(groups))
    limit = HELD_OUT * sum(len(text) for text in topics.values())
    held_out, taken = set(), 0
    for names in (groups[n] for n in order):
        size = sum(len(topics[name]) for name in names)
        if size < limit / 2 and taken + size <= limit * 1.1:  # many small topics rather than one large
            held_out.update(names)
            taken += size
    split = [[(name, topics[name]) for name in sorted(topics) if (name in held_out) == side] for side in (False, True)]
    return _in_memory(split[0]), _in_memory(split[1])


def _in_memory(documents):
    digest = hashlib.sha256("".join(f"{len(text)} {text}" for _, text in documents).encode("utf-8", "surrogatepass"))
    names, characters = tuple(name for name, _ in documents), sum(len(text) for _, text in documents)
    return Corpus((documents,), names, characters, digest.hexdigest())


def _quoting_groups(topics):
    """Lists of topics connected by a shared long paragraph."""
    group = {name: [name] for name in topics}
    first_seen = {}
    for name, text in topics.items():
        for paragraph in text.split("\n\n"):
            paragraph = " ".join(paragraph.split())
            if len(paragraph) < 80:
                continue
            other = first_seen.setdefault(paragraph, name)
            if group[other] is not group[name]:
                group[other].extend(group[name])
                for moved in group[name]:
                    group[moved] = group[other]
    return [sorted(names) for name, names in group.items() if names[0] == name]
