import numpy as np
import pytest

from minisaobp.text.batches import Batch, Batches, in_order
from minisaobp.text.corpora import python_documentation, text_files
from minisaobp.text.masking import IGNORED, mask_tokens, masking
from minisaobp.text.tokenizer import (
    END_OF_TEXT,
    SPECIAL,
    SpecialTokens,
    train_bpe,
    train_wordpiece,
)

PAD, UNK, CLS, SEP, MASK = TOKENS = SpecialTokens()

DOCUMENTS = [("a", "The quick brown fox jumps over the lazy dog. " * 30), ("b", "Él no está: naïve ÜBER straße! " * 20)]


def long_paragraphs(documents):
    split = {" ".join(p.split()) for _, text in documents for p in text.split("\n\n")}
    return {p for p in split if len(p) >= 80}


def test_no_held_out_paragraph_is_in_the_training_text():
    training, held_out = python_documentation()
    sizes = [sum(len(text) for _, text in side) for side in (training, held_out)]
    assert 0.05 < sizes[1] / sum(sizes) < 0.15 and len(held_out.names) > 5
    assert long_paragraphs(held_out) and not long_paragraphs(held_out) & long_paragraphs(training)
    assert [list(side) for side in python_documentation()] == [list(training), list(held_out)]


def test_files_hold_out_their_last_tenth(tmp_path):
    paragraphs = [f"Paragraph {n} of the text." for n in range(100)]
    path = tmp_path / "own.txt"
    path.write_text("\ufeff" + "\n\n".join(paragraphs), encoding="utf-8")
    ((_, training),), ((_, held_out),) = text_files([path])
    assert training.startswith("Paragraph 0") and training.endswith("\n\n") and held_out.startswith("Paragraph 9")
    assert training + held_out == "\n\n".join(paragraphs)
    path.write_text("one line of words " * 50, encoding="utf-8")
    ((_, training),), _ = text_files([path])
    assert training.endswith(" ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b" \n", "is empty"), (b"ab\xff\xfe", r"line 1: not UTF-8 \(byte 3")],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt,? {message}"):
        text_files([path])
    with pytest.raises(ValueError, match="cannot be read"):
        text_files([tmp_path])


def test_tokenizer_repeats_and_lower_cases():
    a, b = (train_wordpiece(DOCUMENTS, 120) for _ in range(2))
    assert a.to_str() == b.to_str() and a.get_vocab_size() <= 120
    assert [a.token_to_id(t) for t in SPECIAL] == [0, 1, 2, 3, 4]
    assert a.encode("The FOX").ids == a.encode("the fox").ids
    assert "[UNK]" in a.encode("漢").tokens
    assert a.encode("a ##x").tokens[1:3] == ["[UNK]", "[UNK]"]  # marks of a special piece mean nothing in a text


def test_a_text_in_many_scripts_does_not_fill_the_vocabulary():
    text = "".join(chr(c) + " " for c in range(0x4E00, 0x4E00 + 2000)) + "some words " * 500
    tokenizer = train_wordpiece([("x", text)], 200)
    assert tokenizer.get_vocab_size() <= 200 and tokenizer.encode("words").tokens == ["words"]


def test_masking_follows_bert():
    ids = np.random.default_rng(0).integers(5, 50, (400, 102))
    ids[:, 0], ids[:, -1] = CLS, SEP
    inputs, labels = mask_tokens(ids, TOKENS, 50, np.random.default_rng(1))
    asked = labels != IGNORED
    assert (asked.sum(1) == 15).all() and not asked[:, [0, -1]].any()
    assert (labels[asked] == ids[asked]).all() and (inputs[~asked] == ids[~asked]).all()
    masked, kept = (inputs[asked] == MASK).mean(), (inputs[asked] == ids[asked]).mean()
    # 6,000 draws: a standard deviation of 0.5%; a random token is the same one once in 45 times
    assert abs(masked - 0.8) < 0.02 and abs(kept - 0.1 - 0.1 / 45) < 0.015
    assert (inputs[asked & (inputs != MASK)] >= len(SPECIAL)).all()


def test_short_and_padded_sequences_are_asked_for_one_token():
    ids = np.array([[CLS, 7, SEP, PAD, PAD], [CLS, SEP, PAD, PAD, PAD]])
    _, labels = mask_tokens(ids, TOKENS, 50, np.random.default_rng(0))
    assert labels.tolist() == [[IGNORED, 7] + [IGNORED] * 3, [IGNORED] * 5]


def test_masking_knows_another_tokenizers_special_tokens():
    special = SpecialTokens(pad=0, unk=7, cls=8, sep=9, mask=3)
    ids = np.tile([8, 1, 2, 4, 5, 6, 9, 0], (200, 1))
    inputs, labels = mask_tokens(ids, special, 10, np.random.default_rng(0))
    asked = labels != IGNORED
    assert not asked[:, [0, 6, 7]].any() and (asked.sum(1) == 1).all()
    assert set(np.unique(inputs[asked])) == {1, 2, 3, 4, 5, 6}


def test_bpe_repeats_and_writes_every_text():
    a, b = (train_bpe(DOCUMENTS, 400) for _ in range(2))
    assert a.to_str() == b.to_str() and a.get_vocab_size() <= 400 and a.token_to_id(END_OF_TEXT) == 0
    text = "Él 漢字\n\ttabs and  spaces "
    assert a.decode(a.encode(text).ids) == text


def test_batches_visit_every_sequence_once_a_pass():
    ids = np.arange(5, 12)[:, None] + np.zeros((1, 6), int)
    batches = Batches(Batch(ids, None, ids > 0), 0, masking(TOKENS, 50))
    seen = [label[label != IGNORED][0] for n in range(7) for label in batches.batch(n, 3).labels]
    assert all(sorted(seen[a : a + 7]) == list(range(5, 12)) for a in (0, 7, 14))
    passes = {tuple(seen[a : a + 7]) for a in (0, 7, 14)}
    assert len(passes) == 3


def test_a_batch_depends_on_seed_and_number_alone():
    ids = np.random.default_rng(0).integers(5, 50, (20, 30))
    make = lambda seed: Batches(Batch(ids, None, ids > 0), seed, masking(TOKENS, 50))  # noqa: E731
    batches = make(0)
    forward = [batches.batch(n, 8).ids for n in range(6)]
    assert all(np.array_equal(make(0).batch(n, 8).ids, forward[n]) for n in reversed(range(6)))
    assert not np.array_equal(forward[0], make(1).batch(0, 8).ids)
    assert np.array_equal(batches.batch(1, 8).ids, forward[1])
    large = Batches(Batch(ids, None), 3).batch(2, 50).ids  # larger than a pass: two passes and a half each time
    assert large.shape == (50, 30) and np.isin(large, ids).all()


def test_in_order_misses_none():
    ids = np.arange(14).reshape(7, 2)
    parts = in_order(Batch(ids, ids + 1), 3)
    assert [len(part.ids) for part in parts] == [3, 3, 1] and parts[0].attention_mask is None
    assert np.array_equal(np.concatenate([part.labels for part in parts]), ids + 1)
