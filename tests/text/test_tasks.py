"""Readers of the official formats, what they say of a bad line, and the arrays made of examples."""

import json
import lzma

import numpy as np
import pytest

from minisaobp.text.batches import Batches
from minisaobp.text.task_examples import encode_task
from minisaobp.text.task_files import Example
from minisaobp.text.tasks import TASKS
from minisaobp.text.tokenizer import SpecialTokens, train_wordpiece
from tests.text.task_fixtures import CONTEXT, choices, glue, squad, write

PAD, UNK, CLS, SEP, MASK = SpecialTokens()


def read(name, data, split="dev", skip_bad=False):
    task = TASKS[name]
    return task.examples(task.find(data, split), split, skip_bad)[0]


def test_glue_files(tmp_path):
    data = glue(tmp_path)
    assert read("sst2", data, "train")[2] == Example(2, "a dull , lifeless mess 0 ", None, 0)
    assert read("sst2", data, "test")[2] == Example("2", 'it " quotes', None, None)  # never quoted
    assert read("cola", data) == [Example(0, "The boat sank.", None, 1), Example(1, "Boat the sank.", None, 0)]
    assert read("mrpc", data)[0] == Example(0, 'He said " yes .', "He agreed .", 1)  # after a byte-order mark
    assert [example.label for example in read("stsb", data)] == [4.25, 0.5]
    for place in (data, data / "glue", data / "glue/SST-2"):
        assert TASKS["sst2"].find(place, "dev") == data / "glue/SST-2/dev.tsv"
    assert TASKS["sst2"].find(data, "dev") and TASKS["qqp"].find(data, "dev") is None


def test_hellaswag_official_and_as_harnesses_show_it(tmp_path):
    official, shown = read("hellaswag", choices(tmp_path))
    assert official.first == shown.first == "Sailing: A boat leaves. The crew They"
    assert official.choices == ("set sail at once.", "eat the sail.", "paint a dog.", "sink.")
    assert (official.label, shown.label) == (2, 1)


def test_race_lines_and_official_folders(tmp_path):
    data = choices(tmp_path)
    first, second = read("race", data)
    assert first.id == "own1.txt-0" and first.second == "Ada _ ." and (first.label, second.label) == (0, 1)
    assert second.choices == ("He flies.", "He swims.", "He sings.", "He sits.")
    folders = read("race", data / "official")
    assert [example.id for example in folders] == ["middle2.txt-0", "middle2.txt-1", "middle10.txt-0", "middle10.txt-1"]


def test_boolq_of_superglue_and_its_own(tmp_path):
    superglue, own = read("boolq", choices(tmp_path))
    assert superglue == Example(5, "is ada a sailor", "Ada -- Ada sails.", 1) and own == superglue._replace(id=1)


def test_crlf_bom_and_packing_change_nothing(tmp_path):
    data = glue(tmp_path / "a")
    content = (data / "glue/SST-2/dev.tsv").read_bytes()
    (tmp_path / "b").mkdir()
    packed = b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n")
    (tmp_path / "b/dev.tsv.xz").write_bytes(lzma.compress(packed))
    assert read("sst2", data) == read("sst2", tmp_path / "b")
    record = choices(tmp_path / "c") / "boolq/dev.jsonl"
    before = read("boolq", tmp_path / "c")
    record.write_bytes(b"\xef\xbb\xbf" + record.read_bytes().replace(b"\n", b"\r\n"))
    assert read("boolq", tmp_path / "c") == before


HELLASWAG = '{"query": "a", "choices": ["a", "b", "c", "d"], "label": %s}'
RACE = '{"id": "x", "article": "a", "questions": ["q"], "options": [["a", "b", "c", "d"]], "answers": ["%s"]}'
BAD = [
    ("sst2", ["sentence\tlabel", "fine\t1", "no label"], 3, "1 columns, expected 2", "wrong columns"),
    ("sst2", ["sentence\tlabel", "a\tb\t1", "fine\t1"], 2, "3 columns, expected 2", "wrong columns"),
    ("sst2", ["sentence\tlabel", "fine\tmaybe", "fine\t1"], 2, "label 'maybe', expected 0, 1", "label"),
    ("rte", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tneutral", "0\ta\tb\tentailment"], 2,
     "label 'neutral', expected entailment, not_entailment", "label"),
    ("stsb", ["sentence1\tsentence2\tscore", "a\tb\t5.1", "a\tb\t5.0"], 2,
     "label '5.1', expected a number from 0 to 5", "label"),
    ("stsb", ["sentence1\tsentence2\tscore", "a\tb\tnan", "a\tb\t5.0"], 2,
     "label 'nan', expected a number from 0 to 5", "label"),
    ("boolq", ['{"question": "a", "passage": "b", "label": true}', '{"question": "a", "pass'], 2,
     "not JSON, or cut off (column 19: Unterminated string starting at)", "not JSON"),
    ("boolq", ['{"question": "a", "passage": "b", "label": true}', "[1]"], 2, "a JSON list, expected an object",
     "wrong fields"),
    ("boolq", ['{"question": "a", "label": true}', '{"question": "a", "passage": "b", "label": true}'], 1,
     "'passage': expected str, got none", "wrong fields"),
    ("boolq", ['{"question": "a", "passage": "b", "label": 2}', '{"question": "a", "passage": "b", "label": true}'], 1,
     "label '2', expected true, false", "label"),
    ("hellaswag", [HELLASWAG % 3, HELLASWAG % 4], 2, "label 4, expected 0, 1, 2, 3", "label"),
    ("hellaswag", [HELLASWAG % 3, '{"query": "a", "choices": ["a"], "label": 0}'], 2,
     "'choices': expected 4 texts, got ['a']", "wrong fields"),
    ("race", [RACE % "A", RACE % "E"], 2, "label 'E', expected A, B, C, D", "label"),
    ("race", [RACE % "A", '{"id": "x", "article": "a", "questions": ["q"], "options": [], "answers": []}'], 2,
     "1 questions, 0 options and 0 answers, expected as many of each", "wrong fields"),
]  # fmt: skip
NAMES = {"boolq": "dev.jsonl", "hellaswag": "val.jsonl", "race": "dev.jsonl"}


@pytest.mark.parametrize(("name", "lines", "number", "reason", "kind"), BAD)
def test_a_bad_line_is_named_or_counted(tmp_path, name, lines, number, reason, kind):
    path = write(tmp_path / NAMES.get(name, "dev.tsv"), *lines)
    with pytest.raises(ValueError) as error:
        TASKS[name].examples(path, "dev")
    assert str(error.value) == f"{path}, line {number}: {reason}"
    examples, skipped = TASKS[name].examples(path, "dev", skip_bad=True)
    assert len(examples) == 1 and skipped == {kind: 1}


def test_wrong_header_empty_split_and_what_is_not_text(tmp_path):
    path = write(tmp_path / "dev.tsv", "text\tlabel", "fine\t1")
    with pytest.raises(ValueError) as error:
        TASKS["sst2"].examples(path, "dev", skip_bad=True)  # no line of it can be read
    assert str(error.value) == f"{path}, line 1: has no column 'sentence', got 'text', 'label'"
    for lines in (["sentence\tlabel"], []):
        write(path, *lines)
        with pytest.raises(ValueError) as error:
            TASKS["sst2"].examples(path, "dev")
        assert str(error.value) == f"{path}: an empty split, expected at least one example"
    write(path, "sentence\tlabel", "fine")
    with pytest.raises(ValueError) as error:
        TASKS["sst2"].examples(path, "dev", skip_bad=True)
    assert str(error.value) == f"{path}: an empty split, expected at least one example (1 wrong columns skipped)"
    path.write_bytes(b"sentence\tlabel\ncaf\xe9\t1\nfine\t1\n")
    with pytest.raises(ValueError) as error:
        TASKS["sst2"].examples(path, "dev")
    assert str(error.value) == f"{path}, line 2: not UTF-8 (byte 4: invalid continuation byte)"
    assert TASKS["sst2"].examples(path, "dev", True)[1] == {"not UTF-8": 1}


def test_a_line_of_50_megabytes(tmp_path):
    path = tmp_path / "dev.tsv"
    path.write_bytes(b"sentence\tlabel\nfine\t1\n" + b"x" * 50_000_000 + b"\t1\nlast\t0\n")
    with pytest.raises(ValueError) as error:
        TASKS["sst2"].examples(path, "dev")
    assert str(error.value) == f"{path}, line 3: longer than 10 MB, expected lines of text"
    examples, skipped = TASKS["sst2"].examples(path, "dev", skip_bad=True)
    assert [example.first for example in examples] == ["fine", "last"] and skipped == {"too long": 1}


# ---- arrays --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([("x", f"{CONTEXT} a b c d one two three four five six seven eight " * 3)], 200)


def test_pairs_are_cut_where_they_are_longer(tokenizer):
    one = tokenizer.encode("a").ids
    long, short = "a " * 30, "b c"
    encoded = encode_task([Example(0, long, short, 1), Example(1, short, None, 0)], tokenizer, 12)
    batch = encoded.rows(np.array([0, 1]))
    b, c = tokenizer.encode("b c").ids
    assert batch.ids[0].tolist() == [CLS, *one * 7, SEP, b, c, SEP] and encoded.truncated == 1
    assert batch.token_type_ids.tolist() == [[0] * 9 + [1] * 3, [0] * 12]
    assert batch.ids[1].tolist() == [CLS, b, c, SEP, *[PAD] * 8] and batch.attention_mask[1].sum() == 4
    assert batch.labels.tolist() == [1, 0] and encoded.rows(np.array([1])).ids.shape == (1, 4)  # as long as its longest
    both = encode_task([Example(0, long, "b " * 30, 1)], tokenizer, 12).rows([0])
    assert both.ids[0].tolist() == [CLS, *one * 5, SEP, *[b] * 4, SEP]


def test_choices_fill_the_blank_or_follow(tokenizer):
    examples = [Example(0, "one", "two _ three", 1, ("a", "b")), Example(1, "one", "two", 0, ("c", "d"))]
    batch = encode_task(examples, tokenizer, 16).rows(slice(0, 2))
    assert batch.ids.shape[:2] == batch.attention_mask.shape[:2] == (2, 2) and batch.labels.tolist() == [1, 0]
    texts = [[tokenizer.decode(row[row != PAD].tolist()) for row in choices] for choices in batch.ids]
    assert texts == [
        [f"[CLS] one [SEP] two {c} three [SEP]" for c in "ab"],
        [f"[CLS] one [SEP] two {c} [SEP]" for c in "cd"],
    ]


def test_batches_of_a_task_repeat_with_the_seed(tokenizer):
    examples = [Example(n, "a " * (n + 1), None, n % 2) for n in range(10)]
    make = lambda: Batches(encode_task(examples, tokenizer, 16), 3)  # noqa: E731
    batches = [make().batch(n, 4) for n in range(5)]
    assert all(np.array_equal(make().batch(n, 4).ids, batches[n].ids) for n in reversed(range(5)))
    seen = [length for batch in batches for length in batch.attention_mask.sum(axis=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(3, 13))


# ---- scores and submissions ----------------------------------------------------------------------------------------


def test_submissions_are_in_the_official_format(tmp_path):
    data = glue(tmp_path)
    test = read("sst2", data, "test")
    assert TASKS["sst2"].submit(test, [1, 0, 1], "SST-2.tsv") == b"index\tprediction\n0\t1\n1\t0\n2\t1\n"
    pair = [Example("0", "a", "b"), Example("1", "a", "b")]
    assert TASKS["rte"].submit(pair, [1, 0], "RTE.tsv").decode().splitlines()[1:] == [
        "0\tnot_entailment",
        "1\tentailment",
    ]
    assert TASKS["stsb"].submit(pair, [5.3, -0.2], "STS-B.tsv").decode().splitlines()[1:] == ["0\t5.000", "1\t0.000"]
    assert TASKS["mnli"].submission["test_mismatched"] == "MNLI-mm.tsv"
    assert TASKS["mnli"].submission["dev_matched"] == "MNLI-m.tsv"
    lines = TASKS["boolq"].submit(pair, [1, 0], "BoolQ.jsonl").decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"idx": "0", "label": "true"}, {"idx": "1", "label": "false"}]
    squad(tmp_path / "dev-v1.1.json")
    said = TASKS["squad"].submit(read("squad", tmp_path), ["Ada Miller", "é", ""], "predictions.json")
    assert json.loads(said) == {"q1": "Ada Miller", "q2": "é", "q3": ""}


def test_the_score_is_the_mean_of_the_metrics():
    examples = [Example(n, "a", "b", label) for n, label in enumerate([1, 1, 1, 0])]
    assert TASKS["mrpc"].score(examples, [1, 1, 0, 0]) == {"accuracy": 0.75, "f1": 0.8, "score": pytest.approx(0.775)}
    assert TASKS["mrpc"].majority(examples)["accuracy"] == 0.75
    numbers = [Example(n, "a", "b", label) for n, label in enumerate([1.0, 2.0, 4.0])]
    assert TASKS["stsb"].majority(numbers) == {"pearson": 0.0, "spearman": 0.0, "score": 0.0}
