"""SQuAD: answers as spans of tokens, long contexts in windows, the best span, the official scores."""

import json

import numpy as np
import pytest

from minisaobp.text.squad import Windows, answer_span, best_span, exact_match, normalise, read_squad, span_of, token_f1
from minisaobp.text.tasks import TASKS
from minisaobp.text.tokenizer import train_wordpiece
from tests.text.task_fixtures import CONTEXT, QUESTIONS, squad, write


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([("x", (CONTEXT + " Who built the boat? How many crowns did she pay? ") * 3)], 200)


@pytest.fixture
def examples(tmp_path):
    squad(tmp_path / "dev-v1.1.json")
    return list(read_squad(tmp_path / "dev-v1.1.json", "dev"))


def test_reading(examples):
    assert [example.id for example in examples] == ["q1", "q2", "q3"] and examples[0].second == CONTEXT
    assert examples[0].answers == (("Ada Miller", CONTEXT.find("Ada")),)


def test_an_answer_inside_a_word_is_moved_to_where_it_stands_alone(tokenizer):
    encoding = tokenizer.encode(CONTEXT)
    offsets = np.array(encoding.offsets)
    inside = CONTEXT.find("7")
    assert CONTEXT[inside - 3 : inside + 1] == "1817"
    first, last = answer_span(CONTEXT, offsets, "7", inside)
    assert offsets[first, 0] == CONTEXT.find("7 crowns") and first == last
    assert answer_span(CONTEXT, offsets, "bui", CONTEXT.find("bui"))[0] == encoding.char_to_token(CONTEXT.find("built"))
    assert span_of(offsets, 3, 4) is None  # a space


@pytest.mark.parametrize(("length", "stride"), [(80, None), (30, None), (24, 3), (34, 1)])
def test_every_answer_comes_back_from_its_windows(tokenizer, examples, length, stride):
    windows = Windows(examples, tokenizer, length, stride)
    batch = windows.rows(slice(0, windows.count))
    assert batch.ids.shape[1] <= length and (windows.count > 3) == (length < 80)
    context = tokenizer.encode(CONTEXT).ids
    for n, example in enumerate(examples):  # the windows of a question hold its whole context, in order
        rows = np.flatnonzero(windows.owner == n)
        held = np.zeros(len(context), int)
        for row in rows:
            first, last = windows.firsts[row], windows.lengths[row] - 1
            places = np.arange(first, last) + windows.shift[row]
            assert batch.ids[row, first:last].tolist() == [context[place] for place in places]
            held[places] += 1
        assert held.all() and (held.max() > 1) == (len(rows) > 1), example.id

    def perfect():
        for a in range(0, windows.count, 4):
            part = windows.rows(slice(a, a + 4))
            scores = np.zeros((len(part.ids), 2, part.ids.shape[1]))
            for n, (start, end) in enumerate(part.labels):
                scores[n, 0, start], scores[n, 1, end] = 5, 5
            yield scores

    labelled = {int(owner) for owner, label in zip(windows.owner, windows.labels, strict=True) if label.any()}
    assert labelled == {0, 1, 2}
    said = windows.answers(perfect())
    assert said == [answer for _, _, answer in QUESTIONS]


def test_a_window_without_the_answer_is_labelled_with_cls(tokenizer, examples):
    windows = Windows(examples[:1], tokenizer, 24, 3)
    for (start, end), first, shift in zip(windows.labels, windows.firsts, windows.shift, strict=True):
        if end:
            offsets = windows.offsets[0]
            assert CONTEXT[offsets[start + shift, 0] : offsets[end + shift, 1]] == "Ada Miller" and start >= first
        else:
            assert start == 0
    assert (windows.labels == 0).all(axis=1).any()


def test_best_span_ends_after_it_starts():
    starts, ends = np.zeros(50), np.zeros(50)
    starts[10], ends[5], ends[12], ends[45] = 8, 9, 3, 8
    assert best_span(starts, ends) == (11.0, (10, 12))  # 5 comes before 10, and 45 is more than 30 tokens away
    assert best_span(starts[:0], ends[:0])[1] is None
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts, ends = rng.standard_normal((2, 15))
        best = max((starts[a] + ends[b], (a, b)) for a in range(15) for b in range(a, 15))
        assert best_span(starts, ends) == best


def test_the_official_scores():
    assert normalise("The  (Big) Apple, a city!") == "big apple city"
    answers = [(("the Denver Broncos", 0), ("Denver", 4)), (("42", 0),), (("a an", 0),)]
    assert exact_match(answers, ["denver broncos!", "43", "the"]) == pytest.approx(2 / 3)
    # "denver team" shares one word of two with "denver": 2 * 1 / (2 + 1)
    assert token_f1(answers[:2], ["Denver team", "42"]) == pytest.approx((2 / 3 + 1) / 2)
    assert token_f1([(("x x y", 0),)], ["x y y"]) == pytest.approx(2 / 3)


def test_what_is_wrong_is_named_by_line_and_question(tmp_path):
    path = tmp_path / "dev-v1.1.json"
    squad(path)
    record = json.loads(path.read_text())
    record["data"][0]["paragraphs"][0]["qas"][1]["answers"][0]["answer_start"] = 3
    text = json.dumps(record, indent=1)
    write(path, text)
    line = next(n for n, row in enumerate(text.splitlines(), 1) if '"q2"' in row)
    with pytest.raises(ValueError) as error:
        TASKS["squad"].examples(path, "dev")
    assert str(error.value) == (f"{path}, line {line}: question q2: answer '7' is not at 3 of its context, ' ' is")
    examples, skipped = TASKS["squad"].examples(path, "dev", skip_bad=True)
    assert [example.id for example in examples] == ["q1", "q3"] and skipped == {"answer not in context": 1}
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=rf"^{path}, line \d+: not JSON, or cut off \(.*\)$"):
        TASKS["squad"].examples(path, "dev", skip_bad=True)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{path}, line 1: expected SQuAD's JSON object"):
        TASKS["squad"].examples(path, "dev")
    write(path, '{"data": []}')
    with pytest.raises(ValueError, match=rf"^{path}: an empty split, expected at least one example$"):
        TASKS["squad"].examples(path, "dev")
    path.write_bytes(b'{"data":\n "\xff"}')
    with pytest.raises(ValueError, match=rf"^{path}, line 2: not UTF-8 \(byte 12 of the file\)$"):
        TASKS["squad"].examples(path, "dev")
