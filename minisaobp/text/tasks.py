"""The tasks of the paper, one declaration each: official files, how they are read, head, metrics, submission.

To add one: a reader if its format is none of those in `task_files.py`, and one declaration in TASKS.
"""

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import task_files
from .scores import accuracy, f1, matthews, pearson, spearman
from .squad import Windows, exact_match, read_squad, token_f1
from .task_examples import encode_task
from .task_files import json_lines, tsv


@dataclasses.dataclass(frozen=True)
class Task:
    """One task. A split's name begins with train, dev or test; the first dev split decides which model is best."""

    title: str  # official name
    folders: tuple  # in one of which its files lie, below the data's folder
    files: dict  # split: names a file (or folder) may have, without .gz or .xz
    rows: dict  # split: official number of examples
    read: Callable  # see `task_files.py`
    head: str  # classification, regression, multiple_choice or span
    metrics: dict  # name: function (labels, predictions) -> number; the score is their mean
    labels: tuple = ()  # classes, as a submission writes them
    submission: dict = dataclasses.field(default_factory=dict)  # split: file name; its end is the format
    prompt: Callable | None = None  # example -> (prompt, choices that go on with it), for a decoder
    length: int = 128  # tokens of a sequence, unless one asks for others

    def find(self, data, split):
        """The path of a split's file below the folder `data`, or None."""
        places = [Path(data) / folder for folder in self.folders] + [Path(data)]
        for place in places:
            for name in self.files[split]:
                for end in ("", ".gz", ".xz"):
                    if (place / f"{name}{end}").exists():
                        return place / f"{name}{end}"
        return None

    def where(self, split):
        """Where a split's file may lie, for an error message."""
        return " or ".join(f"{self.folders[0]}/{name}" for name in self.files[split])

    def examples(self, path, split, skip_bad=False):
        """A list of Example of one file, and a Counter of what was skipped in it.

        Raises ValueError with file, line number and reason if the file or, without skip_bad, a line of it is bad, or if
        it has no example.
        """
        skipped = Counter()
        examples = list(self.read(path, split, skipped if skip_bad else None))
        if not examples:
            why = f" ({_counted(skipped)} skipped)" if skipped else ""
            raise ValueError(f"{path}: an empty split, expected at least one example{why}")
        return examples, skipped

    def encode(self, examples, tokenizer, length, stride=None):
        """Examples as token ids: TaskExamples, or Windows if spans are asked for (stride: context tokens apart)."""
        if self.head == "span":
            return Windows(examples, tokenizer, length, stride)
        return encode_task(examples, tokenizer, length, self.head == "regression")

    def score(self, examples, predictions):
        """{metric: number} of predictions: numbers of classes or choices, numbers, or texts; the mean under "score"."""
        labels = [example.answers if self.head == "span" else example.label for example in examples]
        scores = {name: metric(labels, predictions) for name, metric in self.metrics.items()}
        return scores | {"score": float(np.mean(list(scores.values())))}

    def majority(self, examples):
        """The scores of saying the same of every example, the most frequent label or the mean number; None of spans."""
        if self.head == "span":
            return None
        labels = [example.label for example in examples]
        same = np.mean(labels) if self.head == "regression" else Counter(labels).most_common(1)[0][0]
        return self.score(examples, np.full(len(labels), same))

    def submit(self, examples, predictions, name):
        """A submission file's bytes. name: .tsv is GLUE's (index, prediction), .json SQuAD's {id: text}, .jsonl one
        object {"idx", "label"} a line."""
        said = [self._said(prediction) for prediction in predictions]
        rows = list(zip((example.id for example in examples), said, strict=True))
        if name.endswith(".json"):
            text = json.dumps(dict(rows), ensure_ascii=False, indent=1)
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps({"idx": key, "label": label}) + "\n" for key, label in rows)
        else:
            table = io.StringIO(newline="")
            csv.writer(table, "excel-tab", lineterminator="\n").writerows([("index", "prediction"), *rows])
            text = table.getvalue()
        return text.encode()

    def _said(self, prediction):
        if self.head == "span":
            return prediction
        if self.head == "regression":
            return f"{min(max(float(prediction), 0.0), 5.0):.3f}"
        return self.labels[int(prediction)] if self.labels else int(prediction)


def _counted(skipped):
    return ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())


# ---- GLUE ----------------------------------------------------------------------------------------------------------

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
ACCURACY, ACCURACY_F1 = {"accuracy": accuracy}, {"accuracy": accuracy, "f1": f1}


def _glue(title, texts, label, rows, metrics, labels=None, columns=None, splits=("train", "dev", "test"), submit=None):
    """A task of GLUE: tab-separated files named after their splits. rows: as many as splits."""
    return Task(
        title=title,
        folders=(title, f"glue/{title}", f"GLUE/{title}"),
        files={split: (f"{split}.tsv",) for split in splits},
        rows=dict(zip(splits, rows, strict=True)),
        read=tsv(texts, label, labels, columns),
        head="regression" if labels is None else "classification",
        metrics=metrics,
        labels=labels or (),
        submission=submit or {split: f"{title}.tsv" for split in splits if split != "train"},
    )


PAIR = ("sentence1", "sentence2")
COLA = ("source", "label", "mark", "sentence")  # train and dev have no header
MNLI_SPLITS = ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")
MNLI_FILES = {split: f"MNLI-{'m' if split.endswith('_matched') else 'mm'}.tsv" for split in MNLI_SPLITS[1:]}

TASKS = {
    "cola": _glue("CoLA", ("sentence",), "label", (8551, 1043, 1063), {"matthews": matthews}, BINARY,
        columns={"train": COLA, "dev": COLA}),
    "sst2": _glue("SST-2", ("sentence",), "label", (67349, 872, 1821), ACCURACY, BINARY),
    "mrpc": _glue("MRPC", ("#1 String", "#2 String"), "Quality", (3668, 408, 1725), ACCURACY_F1, BINARY),
    "stsb": _glue("STS-B", PAIR, "score", (5749, 1500, 1379), {"pearson": pearson, "spearman": spearman}),
    "qqp": _glue("QQP", ("question1", "question2"), "is_duplicate", (363846, 40430, 390965), ACCURACY_F1, BINARY),
    "mnli": _glue("MNLI", PAIR, "gold_label", (392702, 9815, 9832, 9796, 9847), ACCURACY,
        ("contradiction", "entailment", "neutral"), splits=MNLI_SPLITS, submit=MNLI_FILES),
    "qnli": _glue("QNLI", ("question", "sentence"), "label", (104743, 5463, 5463), ACCURACY, ENTAILMENT),
    "rte": _glue("RTE", PAIR, "label", (2490, 277, 3000), ACCURACY, ENTAILMENT),
    "wnli": _glue("WNLI", PAIR, "label", (635, 71, 146), ACCURACY, BINARY),
}  # fmt: skip


# ---- question answering --------------------------------------------------------------------------------------------


def _answer_prompt(passage, question, choices):
    return f"{passage}\n\nQuestion: {question}\nAnswer:", [f" {choice}" for choice in choices]


def _race(level, rows):
    return Task(
        title=f"RACE-{level.capitalize()}",
        folders=(f"race-{level}", "RACE", "race"),
        # JSON lines, or the official folders with a file for each passage
        files={split: (f"{split}.jsonl", f"{split}/{level}") for split in ("train", "dev", "test")},
        rows=dict(zip(("train", "dev", "test"), rows, strict=True)),
        read=json_lines(task_files.race),
        head="multiple_choice",
        metrics=ACCURACY,
        labels=("A", "B", "C", "D"),
        submission={"dev": "RACE.jsonl", "test": "RACE.jsonl"},
        prompt=lambda example: _answer_prompt(example.first, example.second, example.choices),
        length=512,
    )


TASKS |= {
    "squad": Task(
        title="SQuAD v1.1",
        folders=("squad-v1.1", "SQuAD", "squad"),
        files={"train": ("train-v1.1.json",), "dev": ("dev-v1.1.json",)},
        rows={"train": 87599, "dev": 10570},
        read=read_squad,
        head="span",
        metrics={"exact_match": exact_match, "f1": token_f1},
        submission={"dev": "predictions.json"},
        length=384,
    ),
    "hellaswag": Task(
        title="HellaSwag",
        folders=("hellaswag", "HellaSwag"),
        files={split: (f"hellaswag_{name}.jsonl", f"{name}.jsonl")
               for split, name in (("train", "train"), ("dev", "val"), ("test", "test"))},
        rows={"train": 39905, "dev": 10042, "test": 10003},
        read=json_lines(task_files.hellaswag),
        head="multiple_choice",
        metrics=ACCURACY,
        submission={"dev": "HellaSwag.jsonl", "test": "HellaSwag.jsonl"},
        prompt=lambda example: (example.first, [f" {choice}" for choice in example.choices]),
    ),
    "race": _race("middle", (25421, 1436, 1436)),
    "race-high": _race("high", (62445, 3451, 3498)),
    "boolq": Task(
        title="BoolQ",
        folders=("boolq", "BoolQ"),
        files={"train": ("train.jsonl",), "dev": ("dev.jsonl", "val.jsonl"), "test": ("test.jsonl",)},
        rows={"train": 9427, "dev": 3270, "test": 3245},
        read=json_lines(task_files.boolq),
        head="classification",
        metrics=ACCURACY,
        labels=("false", "true"),
        submission={"dev": "BoolQ.jsonl", "test": "BoolQ.jsonl"},
        prompt=lambda example: _answer_prompt(example.second, f"{example.first}?", ("no", "yes")),
        length=256,
    ),
}  # fmt: skip
