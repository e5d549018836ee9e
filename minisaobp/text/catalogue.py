"""What lies in a folder of data: each corpus and task with its official counts. Layout and sources: data/README.md."""

import functools
from collections import Counter
from pathlib import Path

from .corpora import whole_files
from .tasks import TASKS

# official words and line ends of each file, as the perplexity per word is of
WIKITEXT = {"valid": 217646, "test": 245569}
CORPORA = {
    "wikitext-2": {"train": 2088628} | WIKITEXT,
    "wikitext-103": {"train": 103227021} | WIKITEXT,
}
WITHOUT_COUNTS = ("bookcorpus", "openwebtext")  # there is no one official copy: their files are only read
ENDS = ("", ".gz", ".xz")


def corpora_in(directory):
    """(title, split, path or None, official words or None, count) of each corpus; count(skip_bad) reads the file and
    gives its words and line ends, and a Counter of what it skipped. It raises ValueError if the file is damaged."""
    rows = []
    for name, splits in CORPORA.items():
        for split, official in splits.items():
            names = [f"{base}{end}" for base in (f"wiki.{split}.tokens", f"{split}.txt") for end in ENDS]
            path = _first(Path(directory) / name, names)
            rows.append((name, split, path, official, functools.partial(_words, path)))
    for name in WITHOUT_COUNTS:
        files = sorted(path for path in (Path(directory) / name).glob("*.txt*") if path.is_file())
        rows += [(name, path.name, path, None, functools.partial(_words, path)) for path in files]
        if not files:
            rows.append((name, "train", None, None, None))
    return rows


def tasks_in(directory):
    """The same of each task's splits, counting examples, and of what else in its folder it can read."""
    rows = []
    for task in TASKS.values():
        known = set()
        for split in task.files:
            path = task.find(directory, split)
            known.add(path)
            rows.append((task.title, split, path, task.rows[split], functools.partial(_examples, task, path, split)))
        ends = {Path(name).suffix for names in task.files.values() for name in names if Path(name).suffix}
        for folder in filter(Path.is_dir, (Path(directory) / name for name in task.folders)):
            for path in sorted(folder.iterdir()):
                if path not in known and _ending(path) in ends:
                    split = _ending(path, 0)
                    rows.append((task.title, split, path, None, functools.partial(_examples, task, path, split)))
    return rows


def _first(folder, names):
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _ending(path, which=1):
    """The end of a file's name, or with 0 what comes before it, .gz and .xz apart."""
    name = path.name.removesuffix(".gz").removesuffix(".xz")
    stem, dot, end = name.rpartition(".")
    return dot + end if which else stem


def _words(path, skip_bad):
    return whole_files([path]).words(), Counter()


def _examples(task, path, split, skip_bad):
    examples, skipped = task.examples(path, split, skip_bad)
    return len(examples), skipped
