"""Examples of a task as token ids: pairs of texts, choices. Kept in few bytes; a batch is as long as its longest."""

import numpy as np
from tqdm import tqdm

from .batches import Batch
from .tokenizer import SpecialTokens

AT_A_TIME = 2048


class TaskExamples:
    """What `Batches` and `in_order` take: a count and rows."""

    def __init__(self, ids, lengths, firsts, labels, truncated=0):
        self.ids = ids  # (N, L) or (N, C, L) of few bytes, padded
        self.lengths = np.asarray(lengths)  # (N,) or (N, C): how many of them are tokens
        self.firsts = np.asarray(firsts)  # as lengths: where the second text begins
        self.labels = labels  # (N,), (N, 2) or None
        self.truncated = getattr(self, "truncated", truncated)  # examples of which tokens were cut

    @property
    def count(self):
        return len(self.ids)

    def rows(self, which):
        """A Batch of these examples, as long as the longest of them."""
        lengths, firsts = self.lengths[which][..., None], self.firsts[which][..., None]
        L = int(lengths.max())
        places = np.arange(L)
        valid = places < lengths
        labels = None if self.labels is None else self.labels[which]
        return Batch(self.ids[which][..., :L].astype(np.int64), labels, valid, (valid & (places >= firsts)).astype(int))


def encode_task(examples, tokenizer, length, regression=False):
    """TaskExamples [CLS] first [SEP] second [SEP] of at most `length` tokens, of which the longer text is cut first.

    With choices the second text is the question with the choice in its blank ("_") or behind it: ids (N, C, L).
    """
    special = SpecialTokens.of(tokenizer)
    choices = len(examples[0].choices)
    rows, lengths, firsts, truncated = [], [], [], 0
    with tqdm(total=len(examples), desc="tokens", unit="example", delay=2, leave=False) as bar:
        for a in range(0, len(examples), AT_A_TIME):
            part = examples[a : a + AT_A_TIME]
            first = [example.first for example in part]
            second = [_second(example) for example in part]  # a list of texts each: choices, one or none
            flat = first + [text for texts in second for text in texts]
            encoded = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
            first_ids = [next(encoded).ids for _ in first]
            for ids, texts in zip(first_ids, second, strict=True):
                cut = False
                for other in [next(encoded).ids for _ in texts] or [None]:
                    row, boundary = _row(ids, other, length, special)
                    cut |= len(row) < len(ids) + (2 if other is None else len(other) + 3)
                    rows.append(row)
                    lengths.append(len(row))
                    firsts.append(boundary)
                truncated += cut
            bar.update(len(part))
    ids, lengths, firsts = compact(rows, length, special, tokenizer), np.array(lengths), np.array(firsts)
    if choices:
        ids, lengths, firsts = (
            array.reshape(len(examples), choices, *array.shape[1:]) for array in (ids, lengths, firsts)
        )
    labels = [example.label for example in examples]
    labels = None if None in labels else np.array(labels, np.float32 if regression else np.int64)
    return TaskExamples(ids, lengths, firsts, labels, truncated)


def _second(example):
    if example.choices:
        return [with_choice(example.second, choice) for choice in example.choices]
    return [] if example.second is None else [example.second]


def with_choice(question, choice):
    """The question with the choice in its blank, or behind it.

    >>> with_choice("Light is _ by ice.", "reflected"), with_choice("What is ice?", "Water.")
    ('Light is reflected by ice.', 'What is ice? Water.')
    """
    if question is None:
        return choice
    return question.replace("_", choice, 1) if "_" in question else f"{question} {choice}"


def _row(first, second, length, special):
    """Ids of one sequence and where the second text begins."""
    if second is None:
        row = [special.cls, *first[: length - 2], special.sep]
        return row, len(row)
    excess = len(first) + len(second) + 3 - length
    if excess > 0:  # take from the longer one until both are as long, then from both
        keep_first, keep_second = len(first), len(second)
        from_longer = min(excess, abs(keep_first - keep_second))
        if keep_first > keep_second:
            keep_first -= from_longer
        else:
            keep_second -= from_longer
        rest = excess - from_longer
        first, second = first[: keep_first - rest // 2], second[: keep_second - (rest + 1) // 2]
    row = [special.cls, *first, special.sep]
    return [*row, *second, special.sep], len(row)


def compact(rows, length, special, tokenizer):
    """Lists of ids as one padded array (N, longest), at most `length`, in two bytes each if that is enough."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    ids = np.full((len(rows), min(length, max(map(len, rows), default=0))), special.pad, dtype)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids
