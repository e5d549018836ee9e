"""diagnose: its sums against each sequence alone, its files, its report, what it refuses."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save_file

import minisaobp as ms
from minisaobp import report
from minisaobp.diagnose import Diagnosis, NotAttention, attention_file, correlation
from minisaobp.nn import Bert, Config
from minisaobp.text.tokenizer import load_tokenizer, train_wordpiece
from tests.bp.test_refinement import attention
from tests.command_line import refused, run

N, B, H, L = 3, 5, 2, 9
MAPS = attention((N, B, H, L, L))
VALID = np.arange(L) < np.array([9, 5, 7, 9, 4])[:, None]
PADDED = np.where(VALID[None, :, None, :, None] & VALID[None, :, None, None, :], MAPS, 0)
PADDED /= np.where(PADDED.sum(-1, keepdims=True) > 0, PADDED.sum(-1, keepdims=True), 1)


def diagnosed(maps, valid=None, size=2, **options):
    diagnosis = Diagnosis("x", **options)
    for a in range(0, maps.shape[1], size):
        diagnosis.add(maps[:, a : a + size], None if valid is None else valid[a : a + size])
    return diagnosis.result()


def without_graphs(result):
    return json.dumps({key: value for key, value in result.items() if "graph" not in key})


def test_layers_are_the_means_of_every_sequence_alone():
    result = diagnosed(PADDED, VALID)
    assert (result["sequences"], result["tokens"], result["causal"]) == (B, int(VALID.sum()), False)
    alone = [PADDED[:, b][..., VALID[b], :][..., VALID[b]] for b in range(B)]
    functions = {"entropy": ms.attention_entropy, "gtd": ms.gtd, "indirect_entropy": ms.indirect_entropy}
    for name, function in functions.items():
        by_head = np.mean([function(A) for A in alone], axis=0)  # [N, H]
        spread = np.std([function(A) for A in alone], axis=0).mean(axis=1)
        # float64 sums in another order; the spread subtracts squares
        np.testing.assert_allclose([row[name] for row in result["layers"]], by_head.mean(axis=1), rtol=1e-12)
        np.testing.assert_allclose([row[name + "_std"] for row in result["layers"]], spread, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose([head[name] for head in result["heads"]], by_head.reshape(-1), rtol=1e-12)
    across = np.mean([ms.cross_layer_gtd(A.mean(axis=1)) for A in alone], axis=0)
    np.testing.assert_allclose([row["cross_layer_gtd"] for row in result["layers"]], across, rtol=1e-12)
    first = [[ms.metrics.row_entropy(A[n])[:, 0].mean() for A in alone] for n in range(N)]
    np.testing.assert_allclose([row[0] for row in result["positional_entropy"]], np.mean(first, axis=1), rtol=1e-12)


def test_batches_of_any_size_give_the_same():
    results = [json.loads(without_graphs(diagnosed(PADDED, VALID, size))) for size in (1, 2, 5)]
    for row in zip(*(result["layers"] for result in results), strict=True):
        for name in ("entropy", "gtd", "sparsity", "sink"):
            np.testing.assert_allclose([r[name] for r in row], row[0][name], rtol=1e-12)


def test_graphs_of_the_first_sequences_alone():
    result = diagnosed(PADDED, VALID, graph_sequences=3)
    assert [(p["sequence"], p["layer"]) for p in result["graphs"]] == [(b, n + 1) for b in range(3) for n in range(N)]
    A = PADDED[1, 1].mean(axis=0)[:5, :5]
    point = result["graphs"][4]
    assert point["gtd"] == pytest.approx(ms.gtd(A)) and point["clustering"] == ms.clustering_coefficient(A)
    assert point["clustering_onnela"] == pytest.approx(ms.clustering_coefficient(A, "onnela"))


def test_causal_attention_counts_what_a_token_may_see():
    causal = np.tril(MAPS) / np.tril(MAPS).sum(-1, keepdims=True)
    assert all(row["sparsity"] < 0.2 for row in diagnosed(causal, causal=True)["layers"])
    assert all(row["sparsity"] > 0.4 for row in diagnosed(causal)["layers"])
    uniform = np.tril(np.ones((1, 2, 2, 16, 16)))
    uniform /= uniform.sum(-1, keepdims=True)
    layer = diagnosed(uniform, causal=True)["layers"][0]
    assert layer["regimes"]["diffuse"] == 2 and layer["normalised_entropy"] == pytest.approx(1, rel=1e-12)


def test_sequences_of_nothing_but_padding_count_for_nothing():
    valid = VALID.copy()
    valid[[0, 2]] = False
    with_empty, without = diagnosed(PADDED, valid), diagnosed(PADDED[:, [1, 3, 4]], VALID[[1, 3, 4]])
    assert with_empty["layers"] == without["layers"] and with_empty["sequences"] == 3
    diagnosis = Diagnosis("x")
    diagnosis.add(PADDED, np.zeros_like(VALID))
    assert (diagnosis.seen, diagnosis.sequences) == (B, 0)


def test_padding_between_tokens_is_left_out():
    holes = np.array([True, False, True, True, False, False, True, True, True])
    maps = np.where(holes[:, None] & holes, MAPS, 0)
    maps /= np.where(maps.sum(-1, keepdims=True) > 0, maps.sum(-1, keepdims=True), 1)
    cut = maps[..., holes, :][..., holes]
    with_holes, without = (r["layers"] for r in (diagnosed(maps, np.tile(holes, (B, 1))), diagnosed(cut)))
    for name in ("entropy", "gtd", "cross_layer_gtd", "sparsity", "sink", "local", "normalised_entropy"):
        np.testing.assert_allclose([r[name] for r in with_holes], [r[name] for r in without], rtol=1e-12, err_msg=name)


def test_attention_to_padding_is_refused():
    with pytest.raises(NotAttention, match=r"layer 1, sequence 2, head 1, row 1 gives 0\.\d+ to padding"):
        diagnosed(MAPS, VALID)


def test_infinitely_many_hops():
    result = diagnosed(MAPS, hops=float("inf"))
    assert result["hops"] is None and json.dumps(result, allow_nan=False)
    wanted = ms.gtd(MAPS, hops=float("inf")).mean(axis=(1, 2))
    np.testing.assert_allclose([row["gtd"] for row in result["layers"]], wanted, rtol=1e-12)
    across = ms.cross_layer_gtd(MAPS.mean(axis=2), hops=float("inf")).mean(axis=1)
    np.testing.assert_allclose([row["cross_layer_gtd"] for row in result["layers"]], across, rtol=1e-12)


def test_names_of_every_kind(tmp_path):
    names = ["$a_$^", "_hidden", "<b>&x", "bad\udcff", "m"]
    for name in names:
        with open(os.fsencode(tmp_path) + b"/" + os.fsencode(name) + b".npy", "wb") as file:
            np.save(file, MAPS[:1, :1])
    files = sorted(os.listdir(os.fsencode(tmp_path)))
    command = [sys.executable, "-m", "minisaobp", "diagnose", "--attention", *files, "--out", "out", "--graphs", "1"]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;&amp;x" in text and "<b>&x" not in text and "&amp;lt;" not in text


def test_many_models_look_different():
    styles = report._styles({f"m{n}": None for n in range(40)} | {"a": "high", "b": "high"}).values()
    looks = {(style["color"], str(style["linestyle"])) for style in styles}
    assert len(looks) == 34  # 8 colours in 4 dashes, then again from the first; and two of a variant's own


def test_regimes_are_counted():
    maps = np.stack([np.stack([np.eye(16), np.full((16, 16), 1 / 16), np.eye(16)[[3] * 16]])] * 4)[None]
    assert diagnosed(maps)["layers"][0]["regimes"] == {"sink": 1, "diffuse": 1, "local": 1, "mixed": 0}


def test_correlation_with_scipy_and_where_there_is_none():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(60)
    points = [{"x": a, "y": a + rng.standard_normal()} for a in x]
    found = correlation([*points, {"x": 1.0, "y": None}, {"x": float("nan"), "y": 2.0}], "x", "y")
    from scipy import stats

    wanted = stats.pearsonr([p["x"] for p in points], [p["y"] for p in points])
    assert found["r"] == pytest.approx(wanted.statistic) and found["p"] == pytest.approx(wanted.pvalue)
    rare = [{"x": 0.1 + 1e-7 * (n == 0), "y": 0.7 + 0.1 * (n == 0)} for n in range(20)]
    assert all(-1 <= end <= 1 for end in correlation(rare, "x", "y")["interval"])
    assert found["points"] == 60 and found["left_out"] == 2
    interval = wanted.confidence_interval()  # by Fisher's transform: the bootstrap is near it, not the same
    np.testing.assert_allclose(found["interval"], interval, atol=0.1)
    assert correlation([{"x": 1.0, "y": n} for n in range(5)], "x", "y")["r"] is None


WRONG = {
    "layer 2, sequence 4, head 1, row 3 sums to 1.05": lambda A: A[1, 3, 0, 2].__imul__(1.05),
    "layer 3, sequence 1, head 2, row 9 has -0.5": lambda A: A[2, 0, 1, 8].__setitem__(0, -0.5),
    "layer 1, sequence 1, head 1, row 1 (has|sums to) nan": lambda A: A[0, 0, 0, 0].__setitem__(4, np.nan),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_attention_is_named(message):
    maps = MAPS.copy()
    WRONG[message](maps)
    with pytest.raises(NotAttention, match=message):
        diagnosed(maps)


def test_rows_of_padding_may_be_anything_finite():
    maps = np.where(VALID[None, :, None, :, None], PADDED, 0.7)
    assert diagnosed(maps, VALID)["layers"][0]["gtd"] == pytest.approx(diagnosed(PADDED, VALID)["layers"][0]["gtd"])


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "half.npz"])
def test_files_of_any_framework(tmp_path, kind):
    path = tmp_path / f"maps.{kind}"
    if kind == "npy":
        np.save(path, MAPS)
    elif kind == "safetensors":
        save_file({"attention": PADDED, "attention_mask": VALID.astype(np.int64)}, path)
    else:
        np.savez(path, attention=PADDED.astype(np.float16 if "half" in kind else float), attention_mask=VALID)
    done = run("diagnose", "--attention", path, "--out", tmp_path / "out", "--batch", 2)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"][0]
    wanted = diagnosed(MAPS) if kind == "npy" else diagnosed(PADDED, VALID)
    assert result["complete"] is True and result["sequences"] == B
    for row, other in zip(result["layers"], wanted["layers"], strict=True):
        assert row["gtd"] == pytest.approx(other["gtd"], rel=1e-3 if "half" in kind else 1e-9)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "own.txt").write_text("\n\n".join(f"Sentence {n} says that {n * n} is its square." for n in range(300)))
    small = [
        "--layers",
        2,
        "--width",
        16,
        "--heads",
        2,
        "--length",
        16,
        "--batch",
        4,
        "--vocabulary",
        300,
        "--steps",
        6,
    ]
    for variant in ("original", "high"):
        done = run(
            "train",
            *small,
            "--corpus",
            folder / "own.txt",
            "--variant",
            variant,
            "--keep-models",
            "--out",
            folder / variant,
        )
        assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(folder / "high" / "models")) == [f"step-{n}" for n in range(7)]
    return folder


class Page(HTMLParser):
    """Tags that are open, and every address that the page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.pictures = [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in ("img", "link", "meta", "br"):
            self.open.append(tag)
        self.pictures += tag == "img"
        self.addresses += [value for key, value in attributes if key in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_of_two_models(trained, tmp_path):
    done = run("diagnose", "--checkpoint", trained / "original", trained / "high", "--out", tmp_path, "--graphs", 2)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["metrics.csv", "metrics.json", "report.html"]
    assert "original: " in done.stdout and "GTD is 0.856" in done.stdout
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.pictures == 7
    assert all(address.startswith("data:") for address in page.addresses)  # nothing is fetched
    assert "0.856" in text and "Incomplete" not in text and "<script" not in text
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv", newline="")))  # noqa: SIM115
    assert len([row for row in rows if row["head"]]) == 2 * (2 + 4)
    assert len([row for row in rows if row["position"]]) == 2 * 2 * 16
    assert len([row for row in rows if row["sequence"]]) == 2 * 2 * 2
    rows = [row for row in rows if row["head"]]
    assert {row["model"] for row in rows} == {"original", "high"}
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    for row in rows:
        result = next(r for r in results if r["name"] == row["model"])
        layer = result["layers"][int(row["layer"]) - 1]
        if row["head"] == "all":
            assert float(row["gtd"]) == layer["gtd"] and float(row["cross_layer_gtd"]) == layer["cross_layer_gtd"]


def test_a_run_over_time(trained, tmp_path):
    done = run("diagnose", "--run", trained / "high", "--out", tmp_path, "--graphs", 0)
    assert done.returncode == 0, done.stderr
    overtime = json.loads((tmp_path / "metrics.json").read_text())["over_training"]
    log = [json.loads(line) for line in (trained / "high" / "metrics.jsonl").read_text().splitlines()]
    assert [p["held_out_loss"] for p in overtime["points"]] == [line["held_out_loss"] for line in log]
    assert len(overtime["correlations"]) == 4 and overtime["correlations"][0]["points"] == 7
    assert "Over training" in (tmp_path / "report.html").read_text()


def test_a_model_of_hugging_face_with_its_vocabulary(tmp_path):
    text = [("x", "The quick brown fox jumps over the lazy dog. " * 30)]
    tokenizer = train_wordpiece(text, 100)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    Bert.initialise(Config(len(words), 16, 1, 2, 32, 64), np.random.default_rng(0)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "text.txt").write_text(text[0][1])
    assert load_tokenizer(tmp_path / "model").encode("The fox").ids == tokenizer.encode("The fox").ids
    done = run(
        "diagnose", "--checkpoint", tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "model" / "vocab.txt").unlink()
    done = run(
        "diagnose", "--checkpoint", tmp_path / "model", "--text", tmp_path / "text.txt", "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and "has no tokenizer: expected tokenizer.json" in done.stderr


def test_interrupted_it_reports_what_it_saw(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "maps.npy", "w+", np.float32, (2, 4000, 2, 32, 32))
    array[...] = 1 / 32
    command = [sys.executable, "-m", "minisaobp", "diagnose", "--attention", str(tmp_path / "maps.npy")]
    command += ["--out", str(tmp_path / "out"), "--batch", "4", "--graphs", "1", "--sequences", "4000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while not re.search(r" [1-9]\d*/4000", seen):
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())["results"][0]
    assert result["complete"] is False and 0 < result["sequences"] < 4000 and "INCOMPLETE" in output
    assert result["layers"][0]["gtd"] == pytest.approx(0.856089, abs=1e-5)
    assert "Incomplete" in (tmp_path / "out" / "report.html").read_text()


def test_bad_files_are_named(tmp_path):
    np.save(tmp_path / "flat.npy", MAPS[0])
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=MAPS, b=MAPS)
    np.savez(tmp_path / "mask.npz", attention=MAPS, attention_mask=VALID[:2])
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    for name, message in (
        ("flat.npy", r"flat.npy: expected shape \(layers, batch, heads, L, L\), got \(5, 2, 9, 9\)"),
        ("objects.npy", "objects.npy cannot be read as an array"),
        ("two.npz", "two.npz: expected one array, or one named attention, got a, b"),
        ("mask.npz", r"mask.npz: attention_mask: expected .* of shape \(5, 9\)"),
        ("cut.safetensors", "cut.safetensors cannot be read"),
        ("none.npy", "none.npy cannot be read"),
        ("maps.txt", "maps.txt: expected a file that ends in"),
    ):
        with pytest.raises(NotAttention, match=message):
            attention_file(tmp_path / name, 2)


def test_bad_input_on_the_command_line_is_one_line(tmp_path, trained):
    bad = MAPS.copy()
    bad[1, 3, 0, 2] *= 1.05
    np.save(tmp_path / "bad.npy", bad)
    np.savez(tmp_path / "none.npz", attention=PADDED, attention_mask=np.zeros_like(VALID))
    shutil.copytree(trained / "high", tmp_path / "few", ignore=shutil.ignore_patterns("step-[2-9]"))
    for arguments, message in (
        (["--attention", "bad.npy", "--text", "x"], "--text: not beside --attention"),
        (["--checkpoint", "nothing"], "--checkpoint: nothing/config.json cannot be read"),
        (["--checkpoint", trained / "high", "--length", "17"], "--length: expected at most the 16 positions"),
        (["--run", "few"], "--run: expected three models or more in few/models .*, got 2"),
        ([], "one of the arguments --checkpoint --attention --run is required"),
        (["--checkpoint", trained / "high", "--hops", "1"], "--hops: expected a whole number from 2"),
        (["--checkpoint", trained / "high", "--hops", "inf", "--beta", "1"], "--beta: expected below 0.999"),
        (["--checkpoint", trained / "high", "--causal"], "--causal: of arrays alone"),
    ):
        refused(tmp_path, ["diagnose", *arguments, "--out", "out"], message)
    for name, message in (  # found while a bar shows how far it is
        ("bad.npy", "bad.npy: layer 2, sequence 4, head 1, row 3 sums to 1.05"),
        ("none.npz", "no sequence has a token that is not padding"),
    ):
        done = run("diagnose", "--attention", tmp_path / name, "--out", tmp_path / "out")
        assert done.returncode == 2 and re.search(message, done.stderr.splitlines()[-1]), done.stderr
        assert not (tmp_path / "out" / "report.html").exists()


def test_interrupted_over_a_run_it_reports_the_models_it_saw(trained, tmp_path):
    arguments = ["--run", str(trained / "high"), "--out", str(tmp_path / "out"), "--graphs", "0", "--batch", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "minisaobp", "diagnose", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = ""
    while "step 1" not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["results"][0]["complete"] is True
    assert len(record["over_training"]["points"]) < 7
