"""The command line as a person meets it: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.command_line import refused, run, run_alone

SMALL = ["--steps", "3", "--layers", "2", "--width", "16", "--heads", "2", "--length", "16", "--batch", "4"]
VARIANTS = ["original", "high", "low", "elemmul"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "own.txt"
    path.write_text("\n\n".join(f"Sentence {n} says that {n * n} is the square of {n}." for n in range(400)))
    return path


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("out") / "new" / "folder"
    done = run_alone("compare", *SMALL, "--corpus", corpus, "--out", out)
    assert done.returncode == 0, done.stderr
    return done, out


def test_compare_writes_what_it_says(small_run):
    done, out = small_run
    assert f"{out}/results.json" in done.stdout and f"{out}/attention.png" in done.stdout
    assert sorted(os.listdir(out)) == ["attention.png", "results.json"]
    assert (out / "attention.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] is True and list(results["variants"]) == VARIANTS
    assert results["settings"]["lam"] == 0.2 and results["environment"]["numpy"]
    for name, row in results["variants"].items():
        assert len(row["training_loss"]) == 3 and 0 <= row["accuracy"] <= 1
        assert row["training_loss"][0] == pytest.approx(results["variants"]["original"]["training_loss"][0], rel=0.01)
        assert all(len(row[measure]) == 2 for measure in ("entropy", "gtd", "indirect_entropy"))
        assert f"{row['loss']:.3f}" in done.stdout
        assert name in done.stdout and row["seconds_per_step"] > 0 and row["ratio_to_original"] > 0
    assert f"{results['unigram']['loss']:.3f}" in done.stdout


def test_same_seed_gives_the_same_losses_to_the_last_bit(small_run, corpus, tmp_path):
    first = json.loads((small_run[1] / "results.json").read_text())["variants"]["high"]
    run_alone("compare", *SMALL, "--corpus", corpus, "--variants", "high", "--out", tmp_path)
    again = json.loads((tmp_path / "results.json").read_text())["variants"]["high"]
    assert again["ratio_to_original"] is None
    for key in ("training_loss", "loss", "accuracy", "entropy", "gtd"):
        assert again[key] == first[key]
    run("compare", *SMALL, "--corpus", corpus, "--variants", "high", "--seed", 1, "--out", tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["variants"]["high"]["loss"] != first["loss"]


def test_interrupt_keeps_what_was_finished(tmp_path, corpus):
    command = [sys.executable, "-m", "minisaobp", "compare", *SMALL[2:], "--steps", "100000"]
    command += ["--corpus", str(corpus), "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):  # until the training bar shows a step
        line = process.stderr.read(40)
        if "loss" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "results.json, marked incomplete" in errors and errors.rstrip().endswith("interrupted")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False and results["variants"] == {}
    assert results["interrupted"]["variant"] == "original" and results["interrupted"]["steps"] >= 1
    assert os.listdir(tmp_path) == ["results.json"]


def test_interrupt_before_anything_is_finished_keeps_an_earlier_run(small_run, corpus):
    _, out = small_run
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    command = [sys.executable, "-m", "minisaobp", "compare", *SMALL[2:], "--steps", "100000"]
    command += ["--corpus", str(corpus), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "loss" not in process.stderr.read(40):
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "nothing was finished" in errors
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_negative_lam_with_an_exponent(corpus, tmp_path):
    done = run("compare", *SMALL, "--variants", "low", "--lam", "-1e-3", "--corpus", corpus, "--out", tmp_path)
    assert done.returncode == 0 and json.loads((tmp_path / "results.json").read_text())["settings"]["lam"] == -1e-3


def test_help_explains_every_option():
    text = run("compare", "--help").stdout
    for option in ["corpus", "variants", "lam", "steps", "seed", "layers", "width", "heads", "length", "batch", "out"]:
        assert f"--{option}" in text
    assert run_alone("--help").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lam", "nan"], "--lam: expected a number from -80 to 80, got 'nan'"),
        (["--lam", "big"], "--lam: .*'big'"),
        (["--variants", "original", "hi"], "--variants: .*original, high, low, elemmul, none, .*linear, got 'hi'"),
        (["--variants", "high", "high"], "--variants: .*each name once"),
        (["--heads", "3", "--width", "16"], "--heads: expected a divisor of --width 16, got 3"),
        (["--steps", "0"], "--steps: expected a whole number from 1 to 1000000000, got '0'"),
        (["--layers", "1" + "0" * 23], "--layers: expected a whole number from 1 to 10000"),
        (["--lam", "81"], "--lam: expected a number from -80 to 80, got '81'"),
        (["--width", "100000", "--heads", "1", "--layers", "99"], "these sizes need about .* GB"),
        (["--seed", "1.5"], "--seed: .*'1.5'"),
        (["--length", "4"], "--length: .*from 8 to"),
        (["--corpus", "missing.txt"], r"--corpus: missing.txt cannot be read \(no such file\)"),
        (["--corpus", "empty.txt"], "--corpus: empty.txt is empty, expected text"),
        (["--corpus", "latin.txt"], "--corpus: latin.txt, line 1: not UTF-8"),
        (["--corpus", "short.txt"], "--corpus: .* shorter than one sequence of --length 16"),
        (["--out", "empty.txt"], "--out: expected a folder that can be written, got 'empty.txt'"),
        (["--out", "/proc/none"], "--out: .*'/proc/none'"),
        (["--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("too short")
    refused(tmp_path, ["compare", *SMALL, *arguments], message)
