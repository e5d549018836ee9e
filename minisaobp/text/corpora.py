"""Where text comes from and which part of it is held out. A document is one (name, text) pair."""

import os

import numpy as np

HELD_OUT = 0.1  # share of the characters


def python_documentation():
    """The Python language reference that CPython carries (pydoc_data.topics): training and held-out documents.

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
    return split[0], split[1]


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


def text_files(paths):
    """UTF-8 files as training and held-out documents: the last tenth of each file is held out.

    The cut is at the next empty line, or else line's end, or else space, as long as half of the tenth remains. Errors
    as of `whole_files`.
    """
    training, held_out = [], []
    for path, text in whole_files(paths):
        cut = _cut(text)
        training.append((path, text[:cut]))
        held_out.append((path, text[cut:]))
    return training, held_out


def whole_files(paths):
    """UTF-8 files as documents. Raises ValueError naming a file that is missing, a folder, not UTF-8 or empty."""
    documents = []
    for path in paths:
        if not os.path.isfile(path):
            reason = "not a file" if os.path.exists(path) else "no such file"
            raise ValueError(f"expected UTF-8 text files, {str(path)!r} cannot be read ({reason})")
        try:
            with open(path, encoding="utf-8-sig") as file:
                text = file.read().strip()
        except UnicodeDecodeError as error:
            where = f"byte {error.start}: {error.reason}"
            raise ValueError(f"expected UTF-8 text files, {str(path)!r} is not UTF-8 ({where})") from None
        except OSError as error:
            raise ValueError(f"expected UTF-8 text files, {str(path)!r} cannot be read ({error.strerror})") from None
        if not text:
            raise ValueError(f"expected text, {str(path)!r} is empty")
        documents.append((str(path), text))
    return documents


def _cut(text):
    start, latest = int(len(text) * (1 - HELD_OUT)), int(len(text) * (1 - HELD_OUT / 2))
    for separator in ("\n\n", "\n", " "):
        at = text.find(separator, start, latest)
        if at >= 0:
            return at + len(separator)
    return start
