"""The real data sets: `python -m pytest -m realdata`, with MINISAOBP_DATA=folder unless they lie in ../shared/data."""

import json
import lzma
import os
from pathlib import Path

import numpy as np
import pytest

from minisaobp.text.catalogue import corpora_in, tasks_in
from minisaobp.text.corpora import whole_files
from minisaobp.text.squad import Windows, exact_match
from minisaobp.text.tasks import TASKS
from minisaobp.text.token_file import tokens_of
from minisaobp.text.tokenizer import load_tokenizer

DATA = Path(os.environ.get("MINISAOBP_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}: name its folder in MINISAOBP_DATA"),
]
VOCABULARY = DATA / "vocab" / "bert-base-uncased-vocab.txt"


@pytest.fixture(scope="module")
def bert():
    if not VOCABULARY.exists():
        pytest.skip(f"no {VOCABULARY}")
    return load_tokenizer(VOCABULARY)


def test_every_official_file_has_its_official_count_and_nothing_is_skipped():
    whole = 0
    for title, split, path, official, count in [*corpora_in(DATA), *tasks_in(DATA)]:
        if path is None:
            continue
        counted, skipped = count(skip_bad=True)
        assert not skipped, (title, split, skipped)
        if official is not None:
            assert counted == official, (title, split)
            whole += 1
    assert whole


def test_wikitext_articles():
    for split, articles in (("train", 600), ("valid", 60), ("test", 60)):  # as the WikiText paper counts them
        path = DATA / "wikitext-2" / f"{split}.txt.xz"
        if path.exists():
            assert len({name for name, _ in whole_files([path])}) == articles


def test_wordpiece_is_the_reference(bert):
    golden = DATA / "vocab" / "wordpiece-golden.jsonl.xz"
    with lzma.open(golden, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 602
    special = [bert.token_to_id("[CLS]")], [bert.token_to_id("[SEP]")]
    for row in rows:
        ids = tokens_of([("x", row["text"])], bert).ids.tolist()
        assert special[0] + ids + special[1] == row["ids"], row["text"]


def test_every_example_becomes_a_sequence(bert):
    for name, task in TASKS.items():
        split = next(split for split in task.files if split.startswith("dev"))
        path = task.find(DATA, split)
        if path is None or task.head == "span":
            continue
        examples, _ = task.examples(path, split)
        encoded = task.encode(examples, bert, 128)
        assert encoded.count == len(examples), name
        batch = encoded.rows(slice(0, 8))
        assert batch.labels is not None and batch.attention_mask.any(axis=-1).all()
        assert (encoded.lengths <= 128).all() and (encoded.lengths > 2).all()
        assert (encoded.truncated > 0) == (name in ("race", "boolq", "hellaswag", "rte", "qnli", "mnli")), name


@pytest.mark.parametrize("length", [128, 384])
def test_squad_answers_come_back_from_their_spans(bert, length):
    """Official exact match of a model that knows every label: at least 99.5% of the questions of both files.

    The rest are answers that are a part of a word ("six" of "sixth") or that SQuAD places in a wrong word.
    """
    folder, counts = DATA / "squad-v1.1", []
    for name in ("dev-v1.1.json.xz", "train-subset-v1.1.json.xz"):
        if not (folder / name).exists():
            pytest.skip(f"no {folder / name}")
        examples, _ = TASKS["squad"].examples(folder / name, "dev")
        windows = Windows(examples, bert, length)
        labelled = windows.labels.any(axis=1)
        assert len(set(windows.owner[labelled])) == len(examples)  # some window holds the whole answer
        texts = [""] * len(examples)
        for n in np.flatnonzero(labelled):
            owner, (first, last) = windows.owner[n], windows.labels[n] + windows.shift[n]
            offsets = windows.offsets[owner]
            texts[owner] = examples[owner].second[offsets[first, 0] : offsets[last, 1]]
        score = exact_match([example.answers[:1] for example in examples], texts)
        counts.append((score * len(examples), len(examples)))
        print(f"{name}: {score:.4%} of {len(examples):,} answers")
        whole = [text for text, example in zip(texts, examples, strict=True) if example.answers[0][0] in text]
        assert len(whole) == len(examples)  # no token of an answer is lost
    assert sum(right for right, _ in counts) / sum(number for _, number in counts) >= 0.995
