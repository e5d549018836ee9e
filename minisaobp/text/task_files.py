"""Examples of the tasks from their official files: tab-separated, JSON lines, RACE's folders.

A reader is a function (path, split, skipped) -> iterator of Example. A bad line raises ValueError with file, line
number and reason, or is counted in the Counter `skipped` if there is one. The files of a test split have no labels.
"""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from .lines import BadLine, lines_of, refuse


class Example(NamedTuple):
    """One row of a task. What is not there is None."""

    id: object  # what a submission calls it
    first: str  # sentence, passage or question
    second: str | None = None  # of a pair
    label: object = None  # number of the class or choice, or the number of a regression; None of a test split
    choices: tuple = ()  # of a multiple choice
    answers: tuple = ()  # (text, place in `second`) of SQuAD, for each person asked


# ---- tab-separated, GLUE -------------------------------------------------------------------------------------------


def tsv(texts, label, labels=None, columns=None):
    """A reader of tab-separated files without quoting.

    texts: names of one or two columns; label: that of the label, one of `labels`, or if that is None a number from 0 to
    5. The first line names the columns, but for the splits of which `columns` does it. Rows are numbered from 0, unless
    a column `index` or `id` of a test split does that.
    """

    def read(path, split, skipped=None):
        test = split.startswith("test")
        names = (columns or {}).get(split)
        row = 0
        for number, line in lines_of(path, skipped):
            cells = line.rstrip("\n").split("\t")
            if names is None:
                names = cells
                missing = [name for name in (*texts, *([] if test else [label])) if name not in names]
                if missing:
                    raise ValueError(
                        f"{path}, line {number}: has no column {', '.join(map(repr, missing))}, "
                        f"got {', '.join(map(repr, cells))[:200]}"
                    )
                continue
            if cells == [""]:
                continue
            try:
                if len(cells) != len(names):
                    raise BadLine("wrong columns", f"{len(cells)} columns, expected {len(names)}")
                record = dict(zip(names, cells, strict=True))
                value = None if test else _label(record[label], labels)
                key = record.get("index", record.get("id", row)) if test else row
                yield Example(key, *(record[name] for name in texts), *[None] * (2 - len(texts)), value)
                row += 1
            except BadLine as bad:
                refuse(path, number, bad, skipped)

    return read


def _label(text, labels):
    if labels is not None:
        if text not in labels:
            raise BadLine("label", f"label {text[:50]!r}, expected {', '.join(labels)}")
        return labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 5:
        raise BadLine("label", f"label {text[:50]!r}, expected a number from 0 to 5")
    return value


# ---- JSON lines ----------------------------------------------------------------------------------------------------


def json_lines(examples_of):
    """A reader of JSON lines. examples_of(record, test, row) gives the examples of one object; it raises BadLine.

    If the path is a folder, each file in it that ends in .txt is one such line, in the order of their names.
    """

    def read(path, split, skipped=None):
        row = 0
        for file, number, line in _records(path, skipped):
            if not line.strip():
                continue
            try:
                for example in examples_of(_parsed(line.rstrip("\n")), split.startswith("test"), row):
                    yield example
                    row += 1
            except BadLine as bad:
                refuse(file, number, bad, skipped)

    return read


def _records(path, skipped):
    if not os.path.isdir(path):
        yield from ((path, number, line) for number, line in lines_of(path, skipped))
        return
    for file in sorted(Path(path).glob("*.txt"), key=lambda file: (len(file.name), file.name)):
        text = "".join(line for _, line in lines_of(file, skipped))
        yield file, 1, text


def _parsed(line):
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadLine("not JSON", f"not JSON, or cut off (column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise BadLine("not JSON", f"JSON that cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise BadLine("wrong fields", f"a JSON {type(record).__name__}, expected an object")
    return record


def field(record, name, kind):
    """record[name], which must be of that kind."""
    value = record.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        got = f"{type(value).__name__} {str(value)[:50]!r}" if name in record else "none"
        raise BadLine("wrong fields", f"{name!r}: expected {kind.__name__}, got {got}")
    return value


def _texts(record, name, count=None):
    """record[name], a list of texts."""
    values = field(record, name, list)
    if not all(isinstance(value, str) for value in values) or (count is not None and len(values) != count):
        what = "texts" if count is None else f"{count} texts"
        raise BadLine("wrong fields", f"{name!r}: expected {what}, got {str(values)[:80]}")
    return values


def hellaswag(record, test, row):
    """One object, official or as evaluation harnesses show it (`query` and `choices`): both give the harness's text."""
    if "query" in record:
        context, choices = field(record, "query", str), _texts(record, "choices", 4)
    else:
        title, ctx_a, ctx_b = (field(record, name, str) for name in ("activity_label", "ctx_a", "ctx_b"))
        context = _without_marks(f"{title}: {ctx_a} {ctx_b.capitalize()}")
        choices = [_without_marks(ending) for ending in _texts(record, "endings", 4)]
    label = None if test else field(record, "label", int)
    if label is not None and not 0 <= label < 4:
        raise BadLine("label", f"label {label}, expected 0, 1, 2, 3")
    yield Example(row, context, None, label, tuple(choices))


def _without_marks(text):
    """WikiHow's marks out of a text: [title] ends a sentence, [header], [step] and others say nothing."""
    text = re.sub(r"\.? \[title\]", ". ", text.strip())
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def boolq(record, test, row):
    """One object, of BoolQ itself (`title`, `answer`) or of SuperGLUE (`label`)."""
    passage, question = field(record, "passage", str), field(record, "question", str)
    if "title" in record:
        passage = f"{field(record, 'title', str)} -- {passage}"
    name = "label" if "label" in record else "answer"
    if not test and name in record and not isinstance(record[name], bool):
        raise BadLine("label", f"label {str(record[name])[:50]!r}, expected true, false")
    yield Example(record.get("idx", row), question, passage, None if test else int(field(record, name, bool)))


def race(record, test, row):
    """One passage with its questions; an id is the passage's with the question's number from 0 behind it."""
    article, questions = field(record, "article", str), _texts(record, "questions")
    answers, options = field(record, "answers", list), field(record, "options", list)
    if not len(questions) == len(answers) == len(options):
        counts = f"{len(questions)} questions, {len(options)} options and {len(answers)} answers"
        raise BadLine("wrong fields", f"{counts}, expected as many of each")
    examples = []
    for n, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        choices = _texts({"options": options[n]}, "options", 4)
        if answer not in ("A", "B", "C", "D"):
            raise BadLine("label", f"label {str(answer)[:50]!r}, expected A, B, C, D")
        key = f"{field(record, 'id', str)}-{n}"
        examples.append(Example(key, article, question, "ABCD".index(answer), tuple(choices)))
    yield from examples  # all of a passage or none
