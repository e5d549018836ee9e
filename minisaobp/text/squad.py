"""SQuAD v1.1: its JSON, spans of tokens for its answers, long contexts in windows, and the official scores.

A window is [CLS] question [SEP] part of the context [SEP]; the windows of one context overlap.
"""

import functools
import json
import re
import string
from collections import Counter

import numpy as np

from .lines import DAMAGED, BadLine, opened, refuse
from .task_examples import TaskExamples, compact
from .task_files import Example, field
from .tokenizer import SpecialTokens

MOST_QUESTION = 64  # tokens of a question that are kept
LONGEST_ANSWER = 30  # tokens of a predicted answer
BEST = 20  # starts, and ends, that are tried in a window
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = set(string.punctuation)


def read_squad(path, split, skipped=None):
    """A reader (see `task_files.py`) of SQuAD v1.1 JSON; questions without answers are allowed in a test split."""
    with opened(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
            data = json.loads(text)
            articles = field(data, "data", list)
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ValueError(f"{path}, line {line}: not UTF-8 (byte {error.start + 1} of the file)") from None
        except json.JSONDecodeError as error:
            where = f"column {error.colno}: {error.msg}"
            raise ValueError(f"{path}, line {error.lineno}: not JSON, or cut off ({where})") from None
        except (BadLine, AttributeError) as error:
            raise ValueError(f"{path}, line 1: expected SQuAD's JSON object ({error})") from None
        except DAMAGED as error:
            raise ValueError(f"{path}, line 1: cannot be unpacked, damaged or cut off ({error})") from None
    for article in articles:
        for paragraph in article.get("paragraphs", []) if isinstance(article, dict) else [None]:
            for question in paragraph.get("qas", []) if isinstance(paragraph, dict) else [None]:
                try:
                    yield _example(paragraph, question, split)
                except BadLine as bad:
                    key = question.get("id") if isinstance(question, dict) else None
                    line = text.count("\n", 0, max(text.find(str(key)), 0)) + 1
                    refuse(path, line, BadLine(bad.kind, f"question {key}: {bad}"), skipped)


def _example(paragraph, question, split):
    if question is None:
        raise BadLine("wrong fields", "an article, paragraph or question that is no object")
    context = field(paragraph, "context", str)
    key, asked = field(question, "id", str), field(question, "question", str)
    answers = []
    for answer in [] if split.startswith("test") else field(question, "answers", list):
        text, start = field(answer, "text", str), field(answer, "answer_start", int)
        if start < 0 or context[start : start + len(text)] != text or not text:
            found = context[max(start, 0) : max(start, 0) + len(text)]
            raise BadLine(
                "answer not in context", f"answer {text[:50]!r} is not at {start} of its context, {found[:50]!r} is"
            )
        answers.append((text, start))
    if not answers and not split.startswith("test"):
        raise BadLine("no answer", "has no answer, expected one at least")
    return Example(key, asked, context, None, (), tuple(answers))


# ---- spans of tokens -----------------------------------------------------------------------------------------------


def span_of(offsets, start, end):
    """The first and the last token that hold a character of [start, end), or None. offsets: (tokens, 2) characters."""
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def answer_span(context, offsets, text, start):
    """The span of an answer. Some of SQuAD's places lie inside another word (the answer "7" in 1817): then it is the
    nearest place where the answer fills whole tokens, as a word if there is one; failing that, the tokens that hold it.
    """
    span = span_of(offsets, start, start + len(text))
    if span is None or context[offsets[span[0], 0] : offsets[span[1], 1]] == text:
        return span
    begins, ends = set(offsets[:, 0].tolist()), set(offsets[:, 1].tolist())
    places = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    places = [place for place in places if place in begins and place + len(text) in ends]
    words = [place for place in places if _stands_alone(context, place, place + len(text))]
    if not places:
        return span
    nearest = min(words or places, key=lambda place: abs(place - start))
    return span_of(offsets, nearest, nearest + len(text))


def _stands_alone(context, start, end):
    return not any(character.isalnum() for character in (*context[:start][-1:], *context[end : end + 1]))


class Windows(TaskExamples):
    """Questions as windows of at most `length` tokens, `stride` context tokens apart.

    Labels are the places of the answer's first and last token, both 0, [CLS], in a window without the whole answer (the
    first of several answers counts). `truncated`: questions of which tokens were cut.
    """

    def __init__(self, examples, tokenizer, length, stride=None):
        special = SpecialTokens.of(tokenizer)
        self.examples, self.offsets, self.truncated = examples, [], 0
        rows, lengths, firsts, labels, owner, shift = [], [], [], [], [], []

        @functools.lru_cache(maxsize=64)  # questions on one context stand together
        def tokens_of(context):
            encoding = tokenizer.encode(context, add_special_tokens=False)
            return encoding.ids, np.array(encoding.offsets, np.int32).reshape(-1, 2)

        for n, example in enumerate(examples):
            question = tokenizer.encode(example.first, add_special_tokens=False).ids
            self.truncated += len(question) > MOST_QUESTION
            question = question[: min(MOST_QUESTION, length // 2 - 2)]
            ids, offsets = tokens_of(example.second)
            self.offsets.append(offsets)
            span = None
            if example.answers:
                text, start = example.answers[0]
                span = answer_span(example.second, offsets, text, start)
            before = [special.cls, *question, special.sep]
            room = length - len(before) - 1
            step = max(1, min(stride or room // 2, room))
            for a in range(0, max(len(ids) - room + step, 1), step):  # until one reaches the end
                part = ids[a : a + room]
                rows.append(before + part + [special.sep])
                lengths.append(len(rows[-1]))
                firsts.append(len(before))
                owner.append(n)
                shift.append(a - len(before))  # place in the context = place in the window + shift
                inside = span is not None and a <= span[0] and span[1] < a + len(part)
                labels.append([place - shift[-1] for place in span] if inside else [0, 0])
        super().__init__(compact(rows, length, special, tokenizer), lengths, firsts, np.array(labels).reshape(-1, 2))
        self.owner, self.shift = np.array(owner), np.array(shift)

    def answers(self, scores):
        """The best answer of each question, a list of texts. scores: an iterator of (B, 2, L) over all windows."""
        best, texts, n = [-np.inf] * len(self.examples), [""] * len(self.examples), 0
        for batch in scores:
            for starts, ends in np.asarray(batch, np.float64):
                first, last = self.firsts[n], self.lengths[n] - 1
                score, span = best_span(starts[first:last], ends[first:last])
                owner = self.owner[n]
                if span is not None and score > best[owner]:
                    a, b = (place + first + self.shift[n] for place in span)
                    offsets = self.offsets[owner]
                    best[owner] = score
                    texts[owner] = self.examples[owner].second[offsets[a, 0] : offsets[b, 1]]
                n += 1
        return texts


def best_span(starts, ends):
    """Score and (first, last) of the best span of at most LONGEST_ANSWER tokens; None where there is no token."""
    if not len(starts):
        return -np.inf, None
    some = np.sort(np.argsort(-starts, kind="stable")[:BEST])
    others = np.sort(np.argsort(-ends, kind="stable")[:BEST])
    length = others - some[:, None] + 1
    total = np.where((length >= 1) & (length <= LONGEST_ANSWER), starts[some][:, None] + ends[others], -np.inf)
    a, b = np.unravel_index(total.argmax(), total.shape)
    if total[a, b] == -np.inf:  # none of the best starts goes with one of the best ends
        a = starts.argmax()
        return starts[a] + ends[a], (int(a), int(a))
    return total[a, b], (int(some[a]), int(others[b]))


# ---- the official scores -------------------------------------------------------------------------------------------


def normalise(text):
    """Lower case, without punctuation and articles, words one space apart, as the official script has it.

    >>> normalise("The  Denver Broncos!")
    'denver broncos'
    """
    text = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answers, predictions):
    """Share of the predictions that are one of the answers, normalised. answers: a tuple of (text, place) for each."""
    return _best_of(lambda said, true: float(said == true), answers, predictions)


def token_f1(answers, predictions):
    """Mean F1 of the words that a prediction shares with the answer it shares most with, normalised."""
    return _best_of(_shared, answers, predictions)


def _best_of(score, answers, predictions):
    pairs = zip(answers, predictions, strict=True)
    return float(np.mean([max(score(normalise(said), normalise(text)) for text, _ in true) for true, said in pairs]))


def _shared(said, true):
    """2 P R / (P + R) of the words."""
    said, true = said.split(), true.split()
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true)) if common else 0.0
