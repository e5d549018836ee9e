"""Questions and answers in files, and the command line, as a person meets them."""

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minisaobp as ms
from minisaobp.cli import main

SHORT = ["--max-length", 16, "--seed", 3]


@pytest.fixture
def run(capfd):
    """The command line, in this process: exit code and what it wrote."""

    def run(*arguments):
        try:
            code = main(["crosscheck", *map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
        output, errors = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=output, stderr=errors)

    return run


def answer(folder, fn, form, gradients=False):
    """A program that reads the folder as its format says, without minisaobp's own code for it."""
    for own in sorted(path.parent for path in Path(folder).glob("*/case.json")):
        case = json.loads((own / "case.json").read_text())
        if form == "npy":
            tensors = {name: np.load(own / about["file"]) for name, about in case["tensors"].items()}
        else:
            tensors = load_file(own / "inputs.safetensors")
        lam = tensors.get("lam", case["parameters"].get("lam"))
        answers = fn(tensors, lam)
        if form == "npy":
            for name, array in answers.items():
                np.save(own / f"{name}.npy", array)
        else:
            save_file({name: np.asarray(array) for name, array in answers.items()}, own / "output.safetensors")


def refined(tensors, lam, **options):
    return {"B": ms.refine(tensors["A"], lam, valid=tensors.get("valid"), **options)}


@pytest.mark.parametrize("form", ["safetensors", "npy"])
def test_a_program_in_another_language(run, tmp_path, form):
    folder = tmp_path / "questions"
    done = run("--export", folder, "--format", form, *SHORT)
    assert done.returncode == 0 and f"--import {folder}" in done.stdout, done.stderr
    done = run("--import", folder)
    assert done.returncode == 2 and "has no answer" in done.stderr and len(done.stderr.splitlines()) == 1

    answer(folder, refined, form)
    done = run("--import", folder)
    assert done.returncode == 0 and "crosscheck PASSED" in done.stdout and "seed 3" in done.stdout, done.stdout

    answer(folder, lambda tensors, lam: refined(tensors, lam, include_self=True), form)
    done = run("--import", folder, "--json")
    verdict = json.loads(done.stdout)
    assert done.returncode == 1 and [r["name"] for r in verdict["readings"]] == ["self-message"]


def test_gradients_in_files(run, tmp_path):
    run("--export", tmp_path, "--gradients", *SHORT)

    def both(tensors, lam, sign=1):
        found = refined(tensors, lam)
        if "dB" in tensors:
            dA, dlam = ms.refine_vjp(tensors["A"], lam, tensors["dB"], valid=tensors.get("valid"))
            found |= {"dA": sign * dA, "dlam": np.asarray(dlam)}
        return found

    answer(tmp_path, both, "safetensors")
    assert run("--import", tmp_path).returncode == 0

    def without_some(tensors, lam):
        return {name: a for name, a in both(tensors, lam).items() if name != "dlam" or "valid" in tensors}

    answer(tmp_path, without_some, "safetensors")
    left_out = run("--import", tmp_path).stdout
    assert re.search(r"gradient of lambda is not judged in \d+ of \d+ cases", " ".join(left_out.split())), left_out
    answer(tmp_path, lambda tensors, lam: both(tensors, lam, -1), "safetensors")
    done = run("--import", tmp_path)
    assert done.returncode == 1 and "its gradient with respect to A differs" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("strange", "says"),
    [
        ({"dlam": np.zeros(0)}, "its gradient with respect to lam has shape (0,), expected ()"),
        ({"dlam": np.zeros((2, 1, 1))}, "its gradient with respect to lam has shape (2, 1, 1), expected ()"),
        ({"dlam": np.array(np.nan)}, "its gradient with respect to lam is not finite"),
        ({"dlam": np.array("a")}, "its gradient is not a number: dlam is <U1"),
        ({"dA": np.full((2, 3, 5, 5), np.nan)}, "its gradient with respect to A is not finite"),
        ({"dA": np.zeros(5)}, "its gradient is not there: no dA of shape (2, 3, 5, 5)"),
    ],
)
def test_gradients_that_cannot_be_compared(run, tmp_path, strange, says):
    run("--export", tmp_path, "--gradients", "--format", "npy", "--max-length", 8, "--seed", 3)

    def right(tensors, lam):
        found = refined(tensors, lam)
        if "dB" in tensors:
            dA, dlam = ms.refine_vjp(tensors["A"], lam, tensors["dB"], valid=tensors.get("valid"))
            found |= {"dA": dA, "dlam": np.reshape(dlam, (1,) if np.ndim(lam) == 0 else lam.shape)}
        return found

    answer(tmp_path, right, "npy")
    assert run("--import", tmp_path).returncode == 0  # a number may be written as an array of one
    for name, array in strange.items():
        np.save(tmp_path / "high-encoder-lam0.2" / f"{name}.npy", array)
    done = run("--import", tmp_path)
    assert done.returncode == 1 and says in done.stdout, done.stdout


def test_a_manifest_that_was_changed(run, tmp_path):
    run("--export", tmp_path, "--max-length", 8, "--seed", 3)
    answer(tmp_path, refined, "safetensors")
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"answer": 3}))
    assert run("--import", tmp_path).returncode == 0  # what is asked follows from the rest
    path.write_text("[" * 100000)
    done = run("--import", tmp_path)
    assert done.returncode == 2 and "cannot be read as JSON" in done.stderr


def test_a_measure_in_files(run, tmp_path):
    run("--export", tmp_path, "--what", "gtd", "--format", "npy", *SHORT)
    answer(tmp_path, lambda tensors, _: {"value": ms.gtd(tensors["A"], hops=3, valid=tensors.get("valid"))}, "npy")
    done = run("--import", tmp_path)
    assert done.returncode == 1 and "hops-off-by-one" in done.stdout, done.stdout


def test_what_is_wrong_with_answers_is_said(run, tmp_path):
    run("--export", tmp_path, *SHORT)
    answer(tmp_path, refined, "safetensors")
    folders = sorted(path.parent for path in tmp_path.glob("*encoder*/case.json"))
    (folders[0] / "output.safetensors").unlink()
    (folders[1] / "output.safetensors").write_bytes(b"half")
    save_file({"C": np.ones(3)}, folders[2] / "output.safetensors")
    save_file({"B": np.ones(3)}, folders[3] / "output.safetensors")
    done = run("--import", tmp_path, "--json")
    assert done.returncode == 1
    problems = {case["id"]: case["problem"] for case in json.loads(done.stdout)["cases"]}
    says = ["has no answer in its folder", "cannot be read as safetensors", "has no tensor B", "returns shape (3,)"]
    for folder, words in zip(folders, says, strict=False):
        assert words in problems[folder.name]

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for broken, says in [
        ("{", "cannot be read as JSON"),
        ("[]", "is not what crosscheck --export wrote"),
        (json.dumps(manifest | {"schema": 2}), "expected schema 1"),
        (json.dumps(manifest | {"sha256": "0"}), "another version"),
        (json.dumps(manifest | {"asked": {"what": "refine"}}), "is not what crosscheck --export wrote"),
    ]:
        (tmp_path / "manifest.json").write_text(broken)
        done = run("--import", tmp_path)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.fixture
def module(run, tmp_path, monkeypatch):
    """How to run the command in a folder with a module of functions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import os, sys, time\n"
        "import minisaobp as ms\n"
        "number = 3\n"
        "def right(A, lam, valid=None):\n    print('noise')\n    return ms.refine(A, lam, valid=valid)\n"
        "def low(A, lam):\n    return ms.refine(A, lam, variant='low')\n"
        "def endless(A, lam):\n    while True: pass\n"
        "def stuck(A, lam):\n    return sum(range(10**18))\n"
        "def leaves(A, lam):\n    os._exit(0)\n"
        "def closes(A, lam):\n    os.closerange(3, 50)\n    time.sleep(600)\n"
        "def __getattr__(name):\n    raise OSError('late') if name == 'lazy' else AttributeError(name)\n"
        "def entropy(A):\n    return ms.attention_entropy(A) / 0.6931471805599453\n"
    )
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "worse.py").write_text("def f(:\n")

    return run


def test_the_command(module):
    done = module("mine:right", "--json", *SHORT)
    assert done.returncode == 0 and json.loads(done.stdout)["passed"] and "noise" in done.stderr, done.stderr
    done = module("mine:low", *SHORT)
    assert done.returncode == 1 and "sign-of-lambda or eq6-positive-beta" in done.stdout.splitlines()[-1], done.stdout
    assert module("mine:low", "--variant", "low", *SHORT).returncode == 0
    done = module("mine:entropy", "--what", "entropy", *SHORT)
    assert done.returncode == 1 and "log-base-2" in done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("endless", "does not return within 0.5 seconds"),
        ("stuck", "does not return within 0.5 seconds"),  # in C, holding the interpreter's lock
        ("leaves", "ended its process (exit code 0)"),
        ("closes", "closed the files of its process and went on"),
    ],
)
def test_the_command_survives(module, name, says):
    done = module(f"mine:{name}", "--limit", 0.5, *SHORT)
    assert done.returncode == 1 and says in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected package.module:function, --export DIR or --import DIR"),
        (["mine"], "expected package.module:function, got 'mine'"),
        (["mine:absent"], "mine has no 'absent'"),
        (["mine:lazy"], "mine does not give 'lazy' (OSError: late)"),
        (["mine:number"], "mine:number is not a function but int"),
        (["missing:f"], "no module named 'missing'"),
        (["bad:f"], "no module named 'nothing_of_this_name', which bad imports"),
        (["worse:f"], "worse cannot be imported (SyntaxError"),
        (["mine:right", "--variant", "BP"], "--variant: expected one or more of original, high, low, elemmul"),
        (["mine:right", "--gradients"], "--gradients: numpy has no derivatives of its own"),
        (["mine:right", "--arrays", "cupy"], "CuPy"),
        (["mine:right", "--import", "x"], "not beside --export or --import"),
        (["mine:right", "--format", "npy"], "--format: of --export only"),
        (["--import", "nowhere"], "manifest.json cannot be read"),
        (["--export", "mine.py"], "expected a folder that can be written, got 'mine.py'"),
        (["--export", "."], "is not empty, expected a new or empty folder"),
    ],
)
def test_bad_input_is_one_line(module, arguments, says):
    if "cupy" in arguments and importlib.util.find_spec("cupy"):
        pytest.skip("there is CuPy here")
    done = module(*arguments)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
