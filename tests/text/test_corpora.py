"""Corpora from their files to the sequences a model is trained on. The texts are written for these tests."""

import gzip
import json
import lzma
import os
from collections import Counter

import numpy as np
import pytest

from minisaobp.text import corpora, lines, token_file
from minisaobp.text.corpora import UNKNOWN, whole_files
from minisaobp.text.dataset import examples_of, read_dataset
from minisaobp.text.masking import IGNORED
from minisaobp.text.packing import CausalSequences, MaskedSequences
from minisaobp.text.token_file import token_file as tokens_in_file
from minisaobp.text.token_file import tokens_of
from minisaobp.text.tokenizer import SpecialTokens, load_tokenizer, train_bpe, train_wordpiece

PAD, UNK, CLS, SEP, MASK = SpecialTokens()
WIKITEXT = """ 
 = The Little Boat = 
 
 A boat of <unk> wood , 1 @,@ 200 kg , well @-@ built . 
 
 = = History = = 
 
 It was 3 @.@ 5 m long . 
 = not a title = 
 
 = A Second Thing = 
 
 Short . 
"""  # noqa: W291, W293


@pytest.fixture
def wikitext(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(WIKITEXT)
    return path


def test_wikitext_markup(wikitext):
    documents = list(whole_files([wikitext]))
    assert [name.rpartition(", ")[2] for name, _ in documents] == [
        "article 1: The Little Boat",
        "article 2: A Second Thing",
    ]
    assert documents[0][1] == (
        f"\n= The Little Boat =\n\nA boat of {UNKNOWN} wood , 1,200 kg , well-built .\n\n= = History = =\n\n"
        "It was 3.5 m long .\n= not a title =\n\n"
    )
    # as the official count does: every word that stands between spaces, and every line's end
    assert whole_files([wikitext]).words() == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    plain = wikitext.with_name("plain.txt")
    plain.write_text("No heading first.\n\n = A Title = \n\nKept @-@ as it stands, <unk> too.\n")
    ((_, text),) = whole_files([plain])
    assert text == plain.read_text()


def test_unk_is_the_tokenizers_unk(wikitext):
    documents = whole_files([wikitext])
    tokenizer = train_wordpiece(documents, 150)
    assert not any(UNKNOWN in piece or "unk" in piece.lower() for piece in {*tokenizer.get_vocab()} - {"[UNK]"})
    tokens = tokens_of(documents, tokenizer)
    assert (tokens.ids == UNK).sum() == 1
    words = tokens_of([("x", f"boat of {UNKNOWN} wood")], tokenizer).ids.tolist()
    known = tokenizer.encode("boat of").ids, tokenizer.encode("wood").ids
    assert words == [*known[0], UNK, *known[1]]
    bpe = train_bpe(documents, 300)
    assert bpe.decode(tokens_of([("x", f"a {UNKNOWN} b")], bpe).ids.tolist()) == "a <unk> b"


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress], ids=["gz", "xz"])
def test_packed_files_bom_and_crlf_give_the_same_text(tmp_path, pack):
    text = "Grüße, a first line.\n\nAnd a last one"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    name = {gzip.compress: "b.txt.gz", lzma.compress: "b.txt.xz"}[pack]
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()))
    plain, packed = (whole_files([tmp_path / file]) for file in ("a.txt", name))
    assert [t for _, t in plain] == [t for _, t in packed] == [text]
    assert plain.fingerprint == packed.fingerprint and plain.characters == len(text)


def test_a_file_that_is_cut_off_says_where(tmp_path):
    path = tmp_path / "a.txt.xz"
    whole = lzma.compress("".join(f"Line {n} {n * 7919 % 1013}.\n" for n in range(20000)).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a.txt.xz, line \d+: cannot be unpacked, damaged or cut off \(Compressed"):
        whole_files([path])
    path.write_bytes(b"no xz")
    with pytest.raises(ValueError, match=r"a.txt.xz, line 1: cannot be unpacked"):
        whole_files([path])


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"a line\n" + b"x" * 50_000_000 + b"\nlast\n")
    with pytest.raises(ValueError, match=r"long.txt, line 2: longer than 10 MB, expected lines of text$"):
        whole_files([path])


@pytest.mark.parametrize("piece", [1, 7, 40])
@pytest.mark.parametrize("train", [train_wordpiece, train_bpe])
def test_pieces_change_no_token(tmp_path, monkeypatch, piece, train):
    text = "a b\n\n\n  indented  twice\n\tand a tab\n" * 20 + "\n \n last   words\n\n"
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = train([("x", text)], 300)
    monkeypatch.setattr(corpora, "PIECE", piece)
    documents = list(whole_files([path]))
    assert len(documents) > 5 and "".join(part for _, part in documents) == text
    tokens = tokens_of(documents, tokenizer)
    assert tokens.ids.tolist() == tokenizer.encode(text).ids and tokens.ends.tolist() == [len(tokens.ids)]


DOCUMENTS = [
    ("a", "The quick brown fox jumps over the lazy dog. " * 30),
    ("b", "Short."),
    ("c", "漢" * 3),
    ("d", "fox " * 8),
]


def test_masked_sequences_never_span_two_documents():
    tokenizer = train_wordpiece(DOCUMENTS[:2], 120)
    tokens = tokens_of(DOCUMENTS, tokenizer)
    sequences = MaskedSequences(tokens, tokenizer, 10)
    ids, labels, valid, _ = sequences.rows(np.arange(sequences.count))
    assert (ids[:, 0] == CLS).all() and ((ids == SEP).sum(axis=1) == 1).all() and ((ids != PAD) == valid).all()
    assert (ids[valid][:-1][ids[valid][1:] == CLS] == SEP).all()
    per_document = [tokenizer.encode(text).ids for _, text in DOCUMENTS]
    rows = [piece for ids in per_document for piece in (ids[a : a + 8] for a in range(0, len(ids), 8))]
    rows = [row for row in rows if set(row) != {UNK}]  # nothing to predict there: left out
    assert [[t for t in row if t not in (CLS, SEP, PAD)] for row in ids.tolist()] == rows
    assert (labels == np.where(np.isin(ids, SpecialTokens()), IGNORED, ids)).all()
    assert sequences.documents == 4 and sequences.documents_cut == 1  # what it says of documents over several batches
    some = sequences.rows(np.array([3, 0]))
    assert (some.ids == ids[[3, 0]]).all() and (some.attention_mask == valid[[3, 0]]).all()


def test_causal_sequences_predict_every_token_once():
    tokenizer = train_bpe(DOCUMENTS, 300)
    end = tokenizer.token_to_id("<|endoftext|>")
    tokens = tokens_of(DOCUMENTS, tokenizer, end)
    stream = [token for _, text in DOCUMENTS for token in (*tokenizer.encode(text).ids, end)]
    assert tokens.ids.tolist() == stream
    sequences = CausalSequences(tokens, tokenizer, 20)
    ids, labels, valid, _ = sequences.rows(np.arange(sequences.count))
    assert ids[0, 0] == end and (ids[1:, 0] == ids[:-1, -1]).all()
    assert [t for row in labels[:, 1:] for t in row if t != IGNORED] == stream
    assert (valid == (labels != IGNORED)).all() and (ids[valid] == labels[valid]).all()
    ends = np.cumsum([len(tokenizer.encode(text).ids) + 1 for _, text in DOCUMENTS])
    cut = sum((a // 19) != ((b - 1) // 19) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    assert sequences.documents == 4 and sequences.documents_cut == cut > 0


def test_sequences_ask_for_the_tokens_they_need():
    with pytest.raises(ValueError, match=r"this one has no \[PAD\], \[UNK\]"):
        examples_of(DOCUMENTS, train_bpe(DOCUMENTS, 300), False, 10)
    with pytest.raises(ValueError, match="endoftext"):
        examples_of(DOCUMENTS, train_wordpiece(DOCUMENTS, 120), True, 10)


def test_the_token_file_is_made_once_and_never_stale(tmp_path, wikitext, monkeypatch):
    corpus, made = whole_files([wikitext]), []
    tokenizer = train_wordpiece(corpus, 150)
    monkeypatch.setattr(token_file, "encoded", lambda *a, e=token_file.encoded: made.append(1) or e(*a))
    first, again = (tokens_in_file(tmp_path / "tokens", corpus, tokenizer) for _ in range(2))
    assert made == [1] and isinstance(again.ids, np.memmap) and again.ids.dtype == np.uint16
    expected = tokens_of(corpus, tokenizer)
    assert np.array_equal(first.ids, expected.ids) and np.array_equal(again.ends, expected.ends)
    (folder,) = (tmp_path / "tokens").iterdir()
    described = json.loads((folder / "description.json").read_text())
    assert described["tokens"] == len(expected.ids) and described["documents"] == 2

    wikitext.write_text(WIKITEXT.replace("Short", "Longer"))  # another text, and another tokenizer
    changed = tokens_in_file(tmp_path / "tokens", whole_files([wikitext]), tokenizer)
    assert not np.array_equal(changed.ids, first.ids)
    tokens_in_file(tmp_path / "tokens", corpus, train_wordpiece(corpus, 120))
    assert len(os.listdir(tmp_path / "tokens")) == 3

    (folder / "tokens.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=rf"{folder} is damaged, delete it to have it made again"):
        tokens_in_file(tmp_path / "tokens", corpus_before(tmp_path), tokenizer)


def corpus_before(tmp_path):
    path = tmp_path / "wiki.txt"
    path.write_text(WIKITEXT)
    return whole_files([path])


def test_interrupted_while_tokenising_nothing_is_left(tmp_path, wikitext, monkeypatch):
    corpus = whole_files([wikitext])
    tokenizer = train_wordpiece(corpus, 150)

    def interrupted(*arguments):
        yield np.array([1]), False
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(token_file, "encoded", interrupted)
        tokens_in_file(tmp_path / "tokens", corpus, tokenizer)
    assert os.listdir(tmp_path / "tokens") == []
    assert len(tokens_in_file(tmp_path / "tokens", corpus, tokenizer).ids)


def test_a_dataset_from_a_file_is_that_from_memory(tmp_path, wikitext):
    text = "\n\n".join(f"Sentence {n} says that {n * n} is the square of {n}." for n in range(100))
    (tmp_path / "own.txt").write_text(text)
    for causal in (False, True):
        memory, file = (
            read_dataset([tmp_path / "own.txt"], causal, 16, 300, held_out=[wikitext], token_folder=folder)
            for folder in (None, tmp_path / "tokens")
        )
        assert memory.fingerprint == file.fingerprint and memory.summary == file.summary
        for a, b in zip(memory.batches(3).batch(5, 4), file.batches(3).batch(5, 4), strict=True):
            assert a is b is None or np.array_equal(a, b)
        assert memory.summary["held_out_words"] == whole_files([wikitext]).words()
    assert len(os.listdir(tmp_path / "tokens")) == 2


def test_of_a_large_corpus_less_is_held_out(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("word " * 2000)
    monkeypatch.setattr(corpora, "MOST_HELD_OUT", 100)
    training, held_out = corpora.text_files([path])
    assert 50 <= held_out.characters <= 100 and training.characters + held_out.characters == 10000
    assert "".join(t for side in (training, held_out) for _, t in side) == path.read_text()


def test_a_vocab_txt_and_a_tokenizer_json_are_read(tmp_path):
    trained = train_wordpiece(DOCUMENTS, 120)
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    (tmp_path / "mine.json").write_text(trained.to_str())
    for path in (tmp_path, tmp_path / "vocab.txt", tmp_path / "mine.json"):
        assert load_tokenizer(path).encode("The lazy FOX 漢").ids == trained.encode("The lazy FOX 漢").ids
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match=r"mine.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path / "mine.json")


def test_max_line_is_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"123456789\nlonger than ten\n\xffx\nend")
    with pytest.raises(ValueError, match="line 2: longer than"):
        list(lines.lines_of(path))
    skipped = Counter()
    assert list(lines.lines_of(path, skipped)) == [(1, "123456789\n"), (4, "end")]
    assert skipped == {"too long": 1, "not UTF-8": 1}
