"""sweep: what a study says, its runs, killed anywhere, and the statistics of its table."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from minisaobp import cli, diagnose
from minisaobp.commands import train
from minisaobp.files import alone_in
from minisaobp.nn import attention
from minisaobp.study import study_of
from minisaobp.sweep import bootstrap_interval, compare_arms, cut_results, read_results, table
from tests.command_line import CUDARuntimeError
from tests.training.test_run import without_seconds

SETTINGS = """
[settings]
layers = 1
width = 16
heads = 2
length = 16
batch = 2
vocabulary = 300
steps = 4
eval_every = 2
"""


def write_study(folder, head, settings=SETTINGS):
    folder.mkdir(exist_ok=True)
    text = folder / "own.txt"
    text.write_text("\n\n".join(f"Sentence {n} says that {n * n} is its square." for n in range(150)))
    (folder / "config.toml").write_text(f"{head}\n{settings}corpus = [{str(text)!r}]\n")
    return folder / "config.toml"


def sweep(config, *more):
    assert cli.main(["sweep", str(config), "--runs", str(config.parent / "runs"), *more]) == 0
    return [json.loads(line) for line in (config.parent / "results.jsonl").read_text().splitlines()]


HEAD = """
variants = ["original", "high", ["linear"]]
seeds = [0, 1]

[arms.rival]
regulariser = "entropy"
regulariser_strength = 0.1

[search]
rates = [1e-3, 1e-2]
seeds = [7]
steps = 2

[check]
arm = "high"
seeds = [8, 9]
steps = 2
"""


def write_lines(folder, lines):
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = write_study(tmp_path_factory.mktemp("study"), HEAD)
    return config, sweep(config)


def test_every_run_is_one_line(finished):
    config, lines = finished
    arms = ["original", "high", "linear", "rival"]
    names = [(line["stage"], line["arm"], line["seed"]) for line in lines]
    assert names == [("search", arm, 7) for arm in arms for _ in range(2)] + [
        *(("run", arm, seed) for seed in (0, 1) for arm in arms),
        *(("check", "high", seed) for seed in (8, 9)),
    ]
    rates = {}
    for line in lines:
        if line["stage"] == "search":
            found = line["measures"]["held_out_loss"], line["configuration"]["rate"]
            rates[line["arm"]] = min(found, rates.get(line["arm"], found))
        elif line["stage"] == "run":
            assert line["configuration"]["rate"] == rates[line["arm"]][1]
            assert [point["step"] for point in line["curves"]] == [0, 2, 4]
    rival = lines[-3]
    assert rival["configuration"]["regulariser"] == "entropy" and rival["configuration"]["seed"] == rival["seed"] == 1
    assert {"entropy", "indirect_entropy", "gtd", "sparsity", "theta"} <= rival["curves"][1]["measures"].keys()
    assert len(rival["measures"]["gtd"]) == 1 and rival["environment"]["numpy"] and rival["device"] == "cpu"
    assert rival["commit"] is None or len(rival["commit"].rstrip("+")) == 40
    runs = config.parent / "runs" / "run"
    assert (runs / "rival-seed-1" / "last" / "model.safetensors").exists() and not list(runs.rglob("checkpoint*"))
    table = (config.parent / "table.md").read_text()
    assert "| held out loss       | rival" in table and "Learning rates: the best of 0.001, 0.01 after 2 steps" in table


def test_what_is_done_is_skipped_and_new_arms_are_added(finished, monkeypatch, tmp_path):
    config, lines = finished
    trained = []
    real = train.train_in_folder
    monkeypatch.setattr(
        train, "train_in_folder", lambda asked, *x, **y: (trained.append(asked), real(asked, *x, **y))[1]
    )
    assert sweep(config) == lines and not trained
    more = tmp_path / "config.toml"
    more.write_text(config.read_text().replace("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    # killed while it wrote a line
    (tmp_path / "results.jsonl").write_text((config.parent / "results.jsonl").read_text() + '{"stage": "ru')
    assert sweep(more)[: len(lines)] == lines
    assert sorted((asked["variant"][0], asked["seed"]) for asked in trained) == [
        ("high", 2), ("linear", 2), ("original", 2), ("original", 2)
    ]  # fmt: skip


def test_check_repeats_what_is_recorded(finished, capsys, tmp_path):
    config, lines = finished
    before = (config.parent / "results.jsonl").read_bytes()
    assert sweep(config, "--check") == lines and "Every number lies within" in capsys.readouterr().out
    assert sweep(config, "--check", "--workers", "2") == lines
    out = capsys.readouterr().out
    assert "Every number lies within" in out and "step 2: " not in out  # which the processes say elsewhere
    assert (config.parent / "results.jsonl").read_bytes() == before
    (tmp_path / "config.toml").write_text(config.read_text())
    changed = json.loads(json.dumps(lines))
    for line in changed[-2:]:
        line["measures"]["gtd"][0] += 0.1
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    refused(
        tmp_path / "config.toml", "not within what the recorded runs differ by: gtd of seed 8, gtd", capsys, "--check"
    )
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    refused(tmp_path / "config.toml", "has not all runs of the stage check", capsys, "--check")
    for value in (-5.0, 50.0):  # altered in one line alone: it must not widen what it is judged by
        changed = json.loads(json.dumps(lines))
        changed[-1]["measures"]["held_out_loss"] = value
        (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        refused(tmp_path / "config.toml", "runs differ by: held_out_loss of seed 9", capsys, "--check")
    changed = json.loads(json.dumps(lines))
    del changed[-1]["measures"]["gtd"], changed[-2]["measures"]["gtd"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    refused(tmp_path / "config.toml", "runs differ by: gtd of seed 8, gtd of seed 9", capsys, "--check")


def test_a_check_that_is_stopped_does_not_go_on(finished, capsys, monkeypatch):
    real = diagnose.by_layer

    def by_layer(*arguments):
        os.kill(os.getpid(), signal.SIGINT)  # ends the run after its next step
        return real(*arguments)

    monkeypatch.setattr(diagnose, "by_layer", by_layer)
    capsys.readouterr()
    assert cli.main(["sweep", str(finished[0]), "--runs", str(finished[0].parent / "runs"), "--check"]) == 130
    assert "goes on" not in capsys.readouterr().err


def refused(config, message, capsys, *more):
    before = sorted(path for path in config.parent.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sweep(config, *more)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "step/s" not in line]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert sorted(path for path in config.parent.rglob("*")) == before


def test_other_settings_are_not_mixed_with_what_is_done(finished, tmp_path, capsys):
    config, lines = finished
    (tmp_path / "config.toml").write_text(config.read_text().replace("steps = 4", "steps = 5"))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "runs").mkdir()
    refused(
        tmp_path / "config.toml", "run: original, seed 0 was run with steps = 4, now it is 5; change it back", capsys
    )
    (tmp_path / "config.toml").write_text(config.read_text().replace("batch = 2", "batch = 3"))
    refused(tmp_path / "config.toml", "check: high, seed 8 was run with batch = 2, now it is 3", capsys, "--check")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("variants = []", "variants: expected a list of distinct values, got []"),
        ("seeds = [0]", "variants: expected at least one, or an arm"),
        ("variants = ['original', 'original']", "variants: expected a list of distinct values"),
        ("variants = ['hi']", "run: hi, seed 0: argument --variant: expected one or more of original"),
        ("variants = [['high', 'low']]", "run: high-low, seed 0: argument --variant: expected 1 values, one per layer"),
        ("variants = ['high', ['high']]", "variants: expected each once, got high twice"),
        ("variants = ['high']\nlams = [100]", "run: high, seed 0: argument --lam: expected a number from -80 to 80"),
        ("variants = ['high']\nlams = 0.2", "lams: expected a list, got 0.2"),
        ("variants = ['high']\nseeds = [true]", "seeds: expected a list, got [True]"),
        ("variants = ['high']\nbaseline = 'low'", "baseline: expected one of high, got 'low'"),
        ("variants = ['high']\nsequences = -1", "sequences: expected a whole number >= 0"),
        ("variants = ['high']\nvariant = 3", "variant: no such key; expected some of arms, baseline"),
        ("[arms.a]\nseed = 3", "arms.a.seed: not an option of one run of a study"),
        ("[arms.'a/b']\nlam = 3", "arms.a/b: expected options under a new name"),
        ("[arms.a]\nlamda = 3", "run: a, seed 0: lamda: no such option; expected some of"),
        ("[arms.a]\n[search]\nrates = [1]", "search: expected rates, seeds and steps, got rates"),
        ("[arms.a]\n[search]\nrates = []\nseeds = [1]\nsteps = 1", "rates: expected a list of distinct values"),
        ("[arms.a]\n[search]\nrates = [99]\nseeds = [1]\nsteps = 1", "argument --rate: expected a number from 0 to 10"),
        ("[arms.a]\n[check]\narm = 'b'\nseeds = [1]\nsteps = 1", "check.arm: expected one of a, got 'b'"),
        ("[arms.a]\n[check]\narm = ['a']\nseeds = [1]\nsteps = 1", "check.arm: expected one of a, got ['a']"),
        ("variants = ['high']\nbaseline = ['high']", "baseline: expected one of high, got ['high']"),
        ("[arms.a]\ndropout = [0.1, 0.2]", "run: a, seed 0: dropout: expected one value, got a list: [0.1, 0.2]"),
        ("[arms.a]\nregulariser = 'eigen'", "run: a, seed 0: argument --regulariser: needs --regulariser-strength"),
        ("[arms.a]\npatch = 3", "arms.a.patch: expected the name of a file, or a list, got 3"),
        ("[arms.a]\npatch = []", "arms.a.patch: expected a list of distinct values, got []"),
        ("[arms.a]\npatch = ['a.py', 'a.py']", "arms.a.patch: expected a list of distinct values, got ['a.py', "),
        ("[arms.a]\npatch = 'a/b.py'", "expected a Python file beside the study's, found no a/b.py"),
        ("[arms.a]\npatch = 'b.py'", "run: a, seed 0: patch: expected a Python file beside the study's, found no b.py"),
        ("variants = ['high']\n[arms.High]\nlam = 3", "arms.High: expected options under a new name"),
        ("variants = ['high']\nprefixes = 3", "prefixes: of decoders alone, and the study has none"),
        ("variants = ['high']\nsequences = 2\ngraphs = 3", "graphs: expected at most the 2 sequences, got 3"),
        ("[arms.a]\n[check]\narm = 'a'\nseeds = [1]\nsteps = 1\ndevice = 'gpu'", "check.device: not an option of one"),
        ("[arms.a]\n[check]\narm = 'a'\nseeds = [1]\nsteps = 1\npatch = 'a.py'", "check.patch: not an option of one"),
        ("[arms.a]\n[finetune.settings]\nseed = 3\n[finetune.tasks.rte]", "finetune.settings.seed: not an option of"),
        ("[arms.a]\n[finetune.tasks.rte]\ncheckpoint = 'a'", "finetune.tasks.rte.checkpoint: not an option of one"),
        ("[arms.a]\n[finetune]\narms = ['a']", "finetune: expected tasks, arms, seeds and settings, got arms"),
        ("[arms.a]\n[finetune]\narms = ['b']\n[finetune.tasks.rte]", "finetune.arms: expected some of a, got 'b'"),
        ("[arms.a]\n[finetune]\nseeds = [7]\n[finetune.tasks.rte]", "finetune.seeds: expected some of 0, got 7"),
        ("[arms.a]\n[finetune.tasks]\nrte = 3", "rte: expected a table, got 3"),
        ("[arms.a]\n[finetune.tasks.rte]\n", "finetune: rte, a, seed 0: the following arguments are required: --data"),
        ("[arms.a]\n[finetune.tasks.x]\n", "finetune: x, a, seed 0: argument --task: invalid choice: 'x'"),
        (
            "[arms.a]\n[check]\narm = 'a'\nseeds = [1]\nsteps = 1\nfinetune = 3",
            "check.finetune: expected a table, got 3",
        ),
        ("[arms.a]\n[check]\narm = 'a'\nseeds = [1]\nsteps = 1\nlamda = 3", "check: a, seed 1: lamda: no such option"),
        ("variants = [", "cannot be read as TOML"),
    ],
)
def test_a_bad_study_is_one_line(tmp_path, capsys, head, message):
    refused(write_study(tmp_path, head), message, capsys)


def test_bad_results_are_one_line(tmp_path, capsys):
    config = write_study(tmp_path, "variants = ['original']")
    (tmp_path / "results.jsonl").write_text('{"stage": "run"}\n')
    refused(config, "results.jsonl, line 1: expected the JSON of one run (keys are missing)", capsys)
    (tmp_path / "results.jsonl").unlink()
    refused(config, "the study has no stage check", capsys, "--check")
    refused(tmp_path / "none.toml", "none.toml cannot be read", capsys)
    config.write_text(config.read_text() + "[arms.a]\npatch = 'a.py'\n")
    (tmp_path / "a.py").write_text("patch = None\n")
    refused(config, "run: a, seed 0: patch: expected a context manager patched() in", capsys)


def test_what_cannot_be_written_is_said_before_any_work(tmp_path, capsys):
    config = write_study(tmp_path, "variants = ['original']")
    (tmp_path / "runs").mkdir()
    (tmp_path / "table.md").mkdir()
    refused(config, "argument CONFIG.TOML: table.md is a folder in ", capsys)
    (tmp_path / "table.md").rmdir()
    (tmp_path / "runs").rmdir()
    (tmp_path / "runs").touch()
    refused(config, "argument --runs: expected a folder that can be written, got '", capsys)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anything")
def test_read_only_results_are_said_before_any_work(finished, tmp_path, capsys):
    config = write_study(tmp_path, "variants = ['original']")
    (tmp_path / "results.jsonl").touch(0o444)
    (tmp_path / "runs").mkdir()
    refused(config, "Permission denied", capsys)


def test_two_sweeps_of_one_study_are_not_at_work_at_once(finished, capsys):
    pytest.importorskip("fcntl")
    config, lines = finished
    for folder in (config.parent, config.parent / "runs"):
        with alone_in(folder):
            refused(config, f"another sweep is at work in {folder}; wait for its end, or stop it", capsys)
            assert sweep(config, "--check") == lines  # which writes nothing there


def test_an_arm_may_be_evaluated_on_another_text(tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"It is said that {n * n} is not {n}." for n in range(50)))
    head = f"variants = ['original']\n[arms.elsewhere]\nheld_out = [{str(other)!r}]\n"
    lines = sweep(write_study(tmp_path, head))
    assert lines[0]["text"] != lines[1]["text"] and lines[1]["configuration"]["held_out"] == [str(other)]


def test_a_run_that_diverges_is_listed(tmp_path):
    head = "variants = ['original']\nseeds = [0]\n[arms.wild]\nrate = 10.0\nweight_decay = 10.0\nwarmup = 0\n"
    lines = sweep(write_study(tmp_path, head, SETTINGS.replace("steps = 4", "steps = 40")))
    assert [line["failed"] is None for line in lines] == [True, False] and lines[1]["measures"] == {}
    assert "diverges" in lines[1]["failed"] or "held-out loss is" in lines[1]["failed"]
    table = (tmp_path / "table.md").read_text()
    assert "Failed, and in no mean:\n\n- run: wild, seed 0: " in table and "0 + 1 failed" in table


def test_a_study_of_the_papers_models(tmp_path):
    head = "variants = ['original']\nseeds = [0]\nsequences = 0"
    settings = "\n[settings]\npreset = 'gpt2-mini'\nvocabulary = 300\nlength = 8\nbatch = 1\nsteps = 1\n"
    (line,) = sweep(write_study(tmp_path, head, settings))
    assert line["configuration"]["preset"] == "gpt2-mini" and line["configuration"]["rate"] == 5e-5
    losses = {"held_out_loss", "held_out_perplexity", "held_out_accuracy"}
    assert line["measures"].keys() == losses | {"word_perplexity"}


def test_killed_again_and_again_it_ends_with_the_same_results(tmp_path):
    head = "variants = ['high']\nseeds = [0, 1]\n[arms.rival]\nregulariser = 'entropy'\nregulariser_strength = 0.1\n"
    settings = SETTINGS.replace("steps = 4", "steps = 100").replace("eval_every = 2", "eval_every = 7")
    whole = write_study(tmp_path / "whole", head, settings)
    cut = tmp_path / "cut" / "config.toml"
    cut.parent.mkdir()
    cut.write_bytes(whole.read_bytes())
    wanted = sweep(whole)
    command = [sys.executable, "-m", "minisaobp", "sweep", str(cut), "--runs", str(cut.parent / "runs")]
    kills, logs = 0, lambda: sum(p.read_bytes().count(b"\n") for p in cut.parent.glob("runs/run/*/metrics.jsonl"))
    while kills < 4:
        now = before = logs()
        deadline = time.monotonic() + 60
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and now < before + 9 and time.monotonic() < deadline:
            now = logs()
            assert now >= before - 1  # it goes on: at most the evaluation that had no checkpoint yet is done again
            time.sleep(0.005)
        time.sleep(0.017 * kills)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills >= 3
    found = sweep(cut)
    for line in (*wanted, *found):
        line["curves"] = without_seconds(line["curves"])

    assert found == wanted
    assert (cut.parent / "table.md").read_bytes() == (tmp_path / "whole" / "table.md").read_bytes()
    for path in (tmp_path / "whole" / "runs").rglob("model.safetensors"):
        assert path.read_bytes() == (cut.parent / "runs" / path.relative_to(whole.parent / "runs")).read_bytes()


def test_a_run_of_two_sittings_says_so(tmp_path, monkeypatch):
    config = write_study(tmp_path, "variants = ['original']\nseeds = [0, 1]")
    monkeypatch.setenv("MINISAOBP_COMMIT", "a")
    with monkeypatch.context() as patch:
        stop_at_evaluation(3, patch)
        assert cli.main(["sweep", str(config), "--runs", str(tmp_path / "runs")]) == 130
    monkeypatch.setenv("MINISAOBP_COMMIT", "b")
    first, second = sweep(config)
    assert first["earlier"] == [{"commit": "a", "device": "cpu", "precision": "float32"}]
    assert (first["commit"], second["commit"], second["earlier"]) == ("b", "b", [])


@pytest.mark.parametrize("error", [MemoryError, CUDARuntimeError])
def test_too_little_memory_names_the_run_and_what_to_lower(tmp_path, monkeypatch, capsys, error):
    def full(*_, **__):
        raise error("cudaErrorMemoryAllocation: out of memory")

    monkeypatch.setattr(train, "train_in_folder", full)
    config = write_study(tmp_path, "variants = ['original']\nseeds = [0]")
    with pytest.raises(SystemExit):
        sweep(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert "original, seed 0: not enough memory for --batch 2 sequences of --length 16: lower --batch" in line
    assert "out of memory)" in line


def without_times(lines):
    for line in lines:
        line["curves"] = without_seconds(line["curves"])
        assert line["environment"].pop("cores") > 0  # a process has its share of them
    return sorted(lines, key=lambda line: (line["stage"], line["arm"], line["seed"], str(line["configuration"])))


def test_several_processes_find_the_same(finished, tmp_path):
    config, lines = finished
    head = HEAD[: HEAD.index("[search]")].replace(
        "seeds = [0, 1]", "seeds = [0]"
    )  # each stage starts its own processes
    (tmp_path / "config.toml").write_text(
        config.read_text().replace(HEAD, head).replace("[settings]", "[settings]\nrate = 1e-2")
    )
    found = sweep(tmp_path / "config.toml", "--workers", "2")
    same = [line for line in json.loads(json.dumps(lines)) if line["stage"] == "run" and line["seed"] == 0]
    same = [line for line in same if line["configuration"]["rate"] == 1e-2]
    arms = [line["arm"] for line in same]
    assert arms and without_times([line for line in found if line["arm"] in arms]) == without_times(same)
    assert len(found) == 4 and "step 4: " in (tmp_path / "runs" / "run" / "high-seed-0" / "output.txt").read_text()


def test_several_processes_stop_at_ctrl_c_and_go_on(tmp_path):
    head = "variants = ['original', 'high']\nseeds = [0]\nsequences = 2\ngraphs = 1\n"
    settings = SETTINGS.replace("steps = 4", "steps = 300").replace("eval_every = 2", "eval_every = 150")
    config = write_study(tmp_path, head, settings)
    command = [sys.executable, "-m", "minisaobp", "sweep", str(config), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("runs/run/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in errors and "Traceback" not in out + errors
    assert list(tmp_path.glob("runs/run/*/checkpoint.safetensors"))
    lines = sweep(config)  # one process goes on with what two began
    alone = write_study(tmp_path / "alone", head, settings)
    assert without_times(lines) == without_times([with_text_of(line, lines[0]) for line in sweep(alone)])
    assert lines[0]["measures"]["clustering"] and lines[0]["measures"]["betweenness"]
    assert lines[0]["measures"]["cross_layer_gtd"][0] == 0


def test_a_killed_process_is_one_line(tmp_path):
    if not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
        pytest.skip("nothing tells here which processes it started")
    settings = SETTINGS.replace("steps = 4", "steps = 3000").replace("eval_every = 2", "eval_every = 10")
    config = write_study(tmp_path, "variants = ['original', 'high']\nsequences = 0\n", settings)
    command = [sys.executable, "-m", "minisaobp", "sweep", str(config), "--runs", str(tmp_path / "runs")]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("runs/run/*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        with open(f"/proc/{p.pid}/task/{p.pid}/children") as file:
            os.kill(int(file.read().split()[-1]), signal.SIGKILL)
        errors = p.stderr.read()
    assert p.returncode == 2 and len(errors.splitlines()) == 1 and "exit code -9: it was killed" in errors, errors


def with_text_of(line, other):
    """The same run on a copy of the text elsewhere."""
    return line | {"text": other["text"], "configuration": other["configuration"] | line["configuration"] | {
        "corpus": other["configuration"]["corpus"]}}  # fmt: skip


PATCH = """
import contextlib
from unittest import mock
from minisaobp.nn import attention

@contextlib.contextmanager
def patched():
    exact = attention.refined_softmax
    with mock.patch.object(attention, "refined_softmax", lambda scores, *rest: exact(3 * scores + 1000, *rest[:-1])):
        yield
"""


def test_a_patch_is_of_its_arm_alone_and_prefixes_show_a_leak(tmp_path, capsys):
    head = "variants = ['original']\nprefixes = 2\n[arms.looks-ahead]\npatch = 'ahead.py'\n"
    settings = SETTINGS.replace("layers", "model = 'decoder'\nlayers").replace("steps = 4", "steps = 60")
    config = write_study(tmp_path, head, settings.replace("eval_every = 2", "rate = 0.03"))
    (tmp_path / "ahead.py").write_text(PATCH)
    original, ahead = sweep(config)
    assert ahead["configuration"]["patch"] == "ahead.py" and "patch" not in original["configuration"]
    found = {
        line["arm"]: line["measures"]["prefix_loss"] - line["measures"]["whole_loss"] for line in (original, ahead)
    }
    assert abs(found["original"]) < 1e-5  # float32, a loss of 5
    assert abs(found["looks-ahead"]) > 1e-3  # the last call drops `causal`: a token may see the one it is asked for
    assert original["measures"]["word_perplexity"] > original["measures"]["held_out_perplexity"]


TOKENISES = """
import contextlib
from unittest import mock
from minisaobp.text import dataset

@contextlib.contextmanager
def patched():
    exact = dataset.train_wordpiece
    with mock.patch.object(dataset, "train_wordpiece", lambda documents, size: exact(documents, size - 1)):
        yield
"""


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_patch_may_tokenise(tmp_path, workers):
    head = "variants = ['original']\nsequences = 1\n[arms.own]\npatch = 'own.py'\n[arms.linear]\nvariant = 'linear'\n"
    config = write_study(tmp_path, head)
    (tmp_path / "own.py").write_text(TOKENISES)
    sweep(config, *workers)
    tables = [
        json.loads((tmp_path / "runs" / "run" / f"{arm}-seed-0" / "last" / "config.json").read_text())["vocab_size"]
        for arm in ("original", "own", "linear")
    ]
    assert tables == [300, 299, 300]  # the text of one arm is not taken for that of another


def test_several_patches_are_in_force_together_and_each_is_known(tmp_path, capsys):
    head = "variants = ['high']\nsequences = 1\n"
    arms = {"own": "'own.py'", "ahead": "'ahead.py'", "both": "['own.py', 'ahead.py']"}
    arms = {name: f"[arms.{name}]\nvariant = 'high'\npatch = {files}\n" for name, files in arms.items()}
    config = write_study(tmp_path, head + "".join(arms.values()))
    (tmp_path / "own.py").write_text(TOKENISES)
    (tmp_path / "ahead.py").write_text(PATCH)
    _, own, ahead, both = sweep(config)
    of = [line["configuration"] for line in (own, ahead, both)]
    assert of[2]["patch_sha256"] == [of[0]["patch_sha256"], of[1]["patch_sha256"]]
    assert own["curves"][0]["held_out_labels"] == both["curves"][0]["held_out_labels"]  # the same pieces
    entropies = [line["measures"]["entropy"] for line in (own, both)]
    assert entropies[0] != entropies[1]  # scores three times as large
    (tmp_path / "ahead.py").write_text(PATCH + "# another\n")
    config.write_text(config.read_text().replace(arms["ahead"], ""))
    refused(config, "run: both, seed 0 was run with patch_sha256 = ['", capsys)


LATE = """
import contextlib
from minisaobp.nn import attention

together = attention.refined_softmax.__name__ == "<lambda>"
if together and {fails}:
    raise RuntimeError("no")

@contextlib.contextmanager
def patched():
    yield
    if together:
        attention.VARIANTS = ()
"""


@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (True, "run: both, seed 0: expected a context manager patched() in "),
        (False, "late.py leaves minisaobp.nn.attention.VARIANTS changed outside patched()"),
    ],
)
def test_patches_that_fail_together_are_one_line(tmp_path, capsys, monkeypatch, workers, fails, message):
    head = "variants = ['high']\nsequences = 1\n[arms.both]\nvariant = 'high'\npatch = ['ahead.py', 'late.py']\n"
    config = write_study(tmp_path, head)
    (tmp_path / "ahead.py").write_text(PATCH)
    (tmp_path / "late.py").write_text(LATE.format(fails=fails))
    monkeypatch.setattr(attention, "VARIANTS", attention.VARIANTS)  # what late.py leaves is undone after the test
    with pytest.raises(SystemExit) as stopped:
        sweep(config, *workers)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "step/s" not in line]
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0], errors


def test_a_changed_patch_is_not_mixed_with_what_is_done(tmp_path, capsys, monkeypatch):
    head = "variants = ['original']\nseeds = [0]\nsequences = 1\n[arms.own]\npatch = 'own.py'\n"
    config = write_study(tmp_path, head)
    (tmp_path / "own.py").write_text(PATCH)
    with monkeypatch.context() as patch:
        stop_at_evaluation(5, patch)  # the second of the arm with the patch
        assert cli.main(["sweep", str(config), "--runs", str(tmp_path / "runs")]) == 130
    (tmp_path / "own.py").write_text(PATCH + "# another\n")
    refused(config, "own-seed-0 holds a run with other options", capsys)
    (tmp_path / "own.py").write_text(PATCH)
    lines = sweep(config)
    assert len(lines[1]["configuration"]["patch_sha256"]) == 64
    (tmp_path / "own.py").write_text(PATCH + "# another\n")
    refused(config, "run: own, seed 0 was run with patch_sha256 = '", capsys)
    del lines[1]["configuration"]["patch_sha256"]  # as older lines are
    write_lines(tmp_path, lines)
    assert sweep(config) == lines
    (tmp_path / "own.py").write_text(PATCH + "\nattention.softmax = attention.softmax.__class__\n")
    softmax = attention.softmax
    try:
        refused(config, "own.py leaves minisaobp.nn.attention.softmax changed outside patched()", capsys)
    finally:
        attention.softmax = softmax


TASKS = """
[finetune]
seeds = [1]
arms = ["high"]
[finetune.settings]
data = {data!r}
epochs = 2
batch = 4
[finetune.tasks.rte]
[finetune.tasks.sst2]
epochs = 1
"""


def write_tasks(folder):
    (folder / "RTE").mkdir(parents=True)
    (folder / "SST-2").mkdir()
    pairs = [f"{n}\tIt is {n}.\tIt is {n % 3}.\t{'entailment' if n % 3 == n else 'not_entailment'}" for n in range(9)]
    sentences = [f"it is {'good' if n % 2 else 'bad'}\t{n % 2}" for n in range(9)]
    for split in ("train", "dev"):
        rte = "\n".join(["index\tsentence1\tsentence2\tlabel", *pairs])
        (folder / "RTE" / f"{split}.tsv").write_text(rte + "\n")
        (folder / "SST-2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *sentences]) + "\n")
    return str(folder)


def stop_at_evaluation(number, monkeypatch):
    evaluations, real = itertools.count(1), diagnose.by_layer

    def by_layer(*arguments):
        if next(evaluations) == number:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(diagnose, "by_layer", by_layer)


def test_a_failed_model_is_not_fine_tuned_and_listed(tmp_path, capsys):
    data = write_tasks(tmp_path / "tasks")
    wild = "[arms.wild]\nrate = 10.0\nweight_decay = 10.0\nwarmup = 0\nsteps = 40\n[arms.nothing]\npatch = 'nan.py'\n"
    tuned = f"[finetune.settings]\ndata = {data!r}\nepochs = 1\n[finetune.tasks.rte]\n"
    config = write_study(tmp_path, f"variants = ['original']\nbaseline = 'wild'\nseeds = [0]\n{wild}{tuned}")
    nan = PATCH.replace("3 * scores + 1000, *rest[:-1]", "float('nan') * scores, *rest")
    (tmp_path / "nan.py").write_text(nan.replace("refined_softmax", "softmax"))
    lines = {(line["stage"], line["arm"]): line for line in sweep(config)}
    assert [line["failed"] is None for line in lines.values()] == [True, False, False] * 2
    for arm in ("wild", "nothing"):  # one has a model of before it diverged, one has none
        failed = lines["finetune", arm]
        assert failed["failed"] == f"its model failed: {lines['run', arm]['failed']}" and failed["measures"] == {}
    table = (tmp_path / "table.md").read_text()
    assert (
        "| rte dev score       | wild     | 0 + 1 failed |" in table
        and "- finetune: rte, nothing, seed 0: its" in table
    )
    shutil.rmtree(tmp_path / "runs")
    write_lines(tmp_path, [line for line in lines.values() if line["stage"] == "run"])
    capsys.readouterr()
    sweep(config)
    assert "[again: 1 of 1] run: original, seed 0" in capsys.readouterr().out  # those that failed are not tried again


def test_what_cannot_be_fine_tuned_is_refused_before_it_is_trained(tmp_path, capsys):
    data = write_tasks(tmp_path / "tasks")
    tuned = f"[finetune.settings]\ndata = {data!r}\n[finetune.tasks.rte]\n"
    head = f"variants = ['original']\n[arms.decoder]\nmodel = 'decoder'\n{tuned}"
    refused(write_study(tmp_path, head), "finetune: rte, decoder, seed 0: argument --checkpoint: expected an e", capsys)
    config = write_study(tmp_path, f"variants = ['original']\n{tuned}length = 17\n")
    refused(config, "argument --length: expected at most the model's 16 positions, got 17", capsys)


def test_the_models_of_a_study_go_on_to_tasks(tmp_path, capsys, monkeypatch):
    head = "variants = ['original', 'high']\nseeds = [0, 1]\n[check]\narm = 'high'\nseeds = [8, 9]\nsteps = 2\n"
    data = write_tasks(tmp_path / "tasks")
    tuned = f"[check.finetune]\ntask = 'rte'\nepochs = 1\ndata = {data!r}\n"
    config = write_study(tmp_path, head + tuned + TASKS.format(data=data), SETTINGS)
    lines = sweep(config)
    of_tasks = [line for line in lines if line["configuration"].get("task")]
    assert [(line["stage"], line["configuration"]["task"], line["seed"]) for line in of_tasks] == [
        ("finetune", "rte", 1), ("finetune", "sst2", 1), ("check-finetune", "rte", 8), ("check-finetune", "rte", 9)
    ]  # fmt: skip
    assert [len(line["curves"]) for line in of_tasks] == [3, 2, 2, 2]
    assert of_tasks[0]["configuration"]["checkpoint"] == "run/high-seed-1"
    where = [{name: lines[0][name] for name in ("commit", "device", "precision")}]
    assert all(line["model"] == where for line in of_tasks)
    for line in of_tasks:
        best = max(point["dev_score"] for point in line["curves"])
        assert line["measures"]["dev_score"] == best and len(line["measures"]["gtd"]) == 1
    assert "| rte dev_score" in (table := (tmp_path / "table.md").read_text().replace("dev score", "dev_score")), table
    assert sweep(config) == lines
    capsys.readouterr()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if line not in of_tasks))
    listed, whole = tmp_path / "again.jsonl", '{"of": "another time"}\n'
    assert not listed.exists()
    listed.write_text(whole)
    with listed.open("a") as file:
        file.write('{"half": "of a li')
    monkeypatch.setenv("MINISAOBP_COMMIT", "of another machine")
    with monkeypatch.context() as patch:  # stopped when the first model has been evaluated twice, or it would be taken
        stop_at_evaluation(2, patch)
        assert cli.main(["sweep", str(config), "--runs", str(tmp_path / "runs")]) == 130
    again = sweep(config)  # the models are trained once more, and the tasks from them
    moved = [line for line in again if line["configuration"].get("task")]
    assert all(line["commit"] == line["model"][-1]["commit"] == "of another machine" for line in moved)
    for line in moved:
        line |= {"commit": where[0]["commit"], "model": where}
    assert without_times(again) == without_times(json.loads(json.dumps(lines)))
    assert capsys.readouterr().out.count(", as recorded") == 3  # high, seed 1, and the two of the check
    assert listed.read_text().startswith(whole)
    found = [json.loads(line) for line in listed.read_text().splitlines()[1:]]
    assert [(line["stage"], line["arm"], line["seed"]) for line in found] == [
        ("run", "high", 1), ("check", "high", 8), ("check", "high", 9)
    ]  # fmt: skip
    assert all(line["commit"] == "of another machine" for line in found)
    other = (tmp_path / "tasks" / "SST-2").rename(tmp_path / "away")  # which the check has no need of
    sweep(config, "--check")
    assert "check-finetune: rte, high, seed 8: dev_score" in capsys.readouterr().out
    other.rename(tmp_path / "tasks" / "SST-2")
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines if line["stage"] != "check-finetune"))
    dev = tmp_path / "tasks" / "RTE" / "dev.tsv"
    dev.write_text((before := dev.read_text()) + "9\tIt is 9.\tIt is 0.\tnot_entailment\n")
    refused(config, "check-finetune: rte, high, seed 8: the text is not that of high, seed 1, in the results", capsys)
    dev.write_text(before)
    elsewhere = config.read_text().replace("[finetune.tasks.rte]", "[finetune.tasks.rte]\ntrain = 'no.tsv'")
    (tmp_path / "config.toml").write_text(elsewhere)
    refused(config, "finetune: rte, high, seed 1: argument --train: ", capsys)
    config.write_text(elsewhere.replace("train = 'no.tsv'", ""))
    (tmp_path / "tasks" / "SST-2" / "dev.tsv").unlink()
    refused(config, "finetune: sst2, high, seed 1: argument --data: ", capsys)


@pytest.mark.parametrize("unlinked", [0, 1])
@pytest.mark.parametrize("again", [False, True])
def test_stopped_before_its_checkpoints_are_gone_a_run_is_listed_once(tmp_path, monkeypatch, unlinked, again):
    data = write_tasks(tmp_path / "tasks")
    config = write_study(tmp_path, "variants = ['high']\nseeds = [1]\n" + TASKS.format(data=data))
    listed = tmp_path / "again.jsonl"
    listed.write_text('{"of": "another time"}')  # without its line end, which an editor may have taken off
    if again:
        lines = sweep(config)
        shutil.rmtree(tmp_path / "runs")
        write_lines(tmp_path, lines[:1])
    calls, real = itertools.count(), Path.unlink

    def unlink(path, missing_ok=False):
        if path.name.startswith("checkpoint") and next(calls) == unlinked:
            raise KeyboardInterrupt
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        assert cli.main(["sweep", str(config), "--runs", str(tmp_path / "runs")]) == 130
    assert len(sweep(config)) == 3
    first, *more = map(json.loads, listed.read_text().splitlines())
    assert first == {"of": "another time"} and [line["arm"] for line in more] == ["high"] * again


# ---- the table -------------------------------------------------------------------------------------------------------


def line(arm, seed, loss, failed=None):
    measures = {} if failed else {"held_out_loss": loss, "gtd": [loss, loss + 2]}
    return {"stage": "run", "arm": arm, "seed": seed, "configuration": {}, "measures": measures, "failed": failed}


def test_means_deviations_and_paired_differences():
    study = study_of({"variants": ["original", "high"], "seeds": [0, 1, 2]})
    results = [line("original", 0, 10.0), line("original", 1, 20.0), line("original", 2, 60.0)]
    results += [
        line("high", 0, 9.0),
        line("high", 1, 18.0),
        line("high", 3, 1.0),
        line("high", 2, 0, failed="diverges"),
    ]
    rows = {(row["measure"], row["arm"]): row for row in compare_arms(study, results)}
    assert rows.keys() == set(itertools.product(("held_out_loss", "gtd"), ("original", "high")))
    base, high = rows["held_out_loss", "original"], rows["held_out_loss", "high"]
    assert (base["mean"], base["runs"], base["difference"], base["interval"]) == (30, 3, None, None)
    assert base["deviation"] == pytest.approx(np.sqrt((400 + 100 + 900) / 2))
    assert (high["runs"], high["failed"], high["pairs"], high["difference"]) == (2, 1, 2, -1.5)  # of -1 and -2
    assert high["mean"] == 13.5 and "no longer has them: run: high, seed 3." in table(study, rows.values(), results)
    by_t = [-1.5 - 12.7062 * 0.5, -1.5 + 12.7062 * 0.5]  # a table's t of one degree of freedom, standard error 0.5
    assert high["t_interval"] == pytest.approx(by_t, abs=1e-4) and base["t_interval"] is None
    assert high["interval"] == [-2, -1] and rows["gtd", "high"]["difference"] == -1.5
    alone = compare_arms(study, [line("high", 0, 9.0)])
    assert [row["difference"] for row in alone] == [None] * 4 and alone[1]["deviation"] is None


def test_the_bootstrap_against_every_resample():
    differences = [-1.0, 0.5, 2.0, -0.3, 0.9]
    means = [np.mean(drawn) for drawn in itertools.product(differences, repeat=5)]  # all 3125
    # 10,000 draws: a quantile near 2.5% has a standard deviation of sqrt(0.025 * 0.975 / 10000) / density = 0.02
    np.testing.assert_allclose(bootstrap_interval(differences), np.quantile(means, [0.025, 0.975]), atol=0.08)
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([2.0, 2.0]) == [2.0, 2.0]


def test_half_a_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    one = line("high", 0, 1.0) | {"text": "", "curves": []}
    whole, other = json.dumps(one) + "\n", json.dumps(one | {"seed": 1}) + "\n"
    path = tmp_path / "results.jsonl"
    path.write_text(whole + whole[:10])
    assert read_results(path) == ([one], len(whole))
    path.write_text("5\n" + whole)
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: expected the JSON of one run"):
        read_results(path)
    assert read_results(tmp_path / "none") == ([], 0)
    path.write_text(whole + other + whole)
    with pytest.raises(ValueError, match=r"results.jsonl, line 3: the run of line 1 once more"):
        read_results(path)
    path.write_text(whole + other[:-1])  # all of it is there
    lines, size = read_results(path)
    assert len(lines) == 2
    cut_results(path, size)
    assert path.read_text() == whole + other
    path.write_text(whole + whole[:10])
    cut_results(path, len(whole))
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "1"}, "seed is '1'"),
        ({"arm": ["high"]}, "arm is ['high']"),
        ({"configuration": []}, "configuration is []"),
        ({"stage": "search"}, "configuration has no rate"),
        ({"measures": {}}, "measures has no held_out_loss"),
        ({"measures": {"held_out_loss": 1.0, "gtd": "high"}}, "gtd is 'high'"),
        ({"measures": {"held_out_loss": float("nan")}}, "held_out_loss is nan"),
        ({"measures": {"held_out_loss": 1.0}, "configuration": {"task": "rte"}}, "measures has no dev_score"),
    ],
)
def test_a_line_that_somebody_has_edited_is_named(tmp_path, change, message):
    write_lines(tmp_path, [line("high", 0, 1.0) | {"text": None, "curves": []} | change])
    with pytest.raises(ValueError) as raised:
        read_results(tmp_path / "results.jsonl")
    assert f"line 1: expected the JSON of one run ({message})" in str(raised.value)


def searched(arm, rate, loss, failed=None, seed=7):
    return line(arm, seed, loss, failed) | {"stage": "search", "configuration": {"rate": rate}}


def test_the_best_rate_is_that_of_the_search_as_it_is_now():
    study = study_of({"variants": ["original", "high"], "search": {"rates": [3.0, 1.0, 2.0], "seeds": [7], "steps": 1}})
    results = [searched("original", rate, loss) for rate, loss in ((3.0, 9.0), (1.0, 8.0), (2.0, 8.0))]
    results += [searched("original", 1.0, 0.0, seed=6)]  # of a seed that is no longer searched with
    results += [searched("high", rate, 0, "diverges") for rate in (3.0, 1.0, 2.0)]
    assert [job.options["rate"] for job in study.jobs("run", results)] == [1.0, 1.0]
    text = table(study, compare_arms(study, results), results)
    assert "original 1 (an end of the range), high 1 (none is the best: every run of its search failed)" in text
    assert "- search: high, rate 2.0, seed 7: diverges" in text
    assert "no longer has them: search: original, rate 1.0, seed 6." in text


@pytest.mark.filterwarnings("error")
def test_huge_perplexities_make_no_warning():
    study = study_of({"variants": ["high"], "seeds": [0, 1]})
    results = [line("high", seed, 0) | {"measures": {"held_out_perplexity": 1e304 * (seed + 1)}} for seed in (0, 1)]
    assert compare_arms(study, results)[0]["deviation"] == np.inf
