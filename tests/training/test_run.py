"""A run in a folder: what it leaves behind, stopped anywhere and gone on with, and damaged checkpoints."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minisaobp import from_pretrained
from minisaobp.training import run
from minisaobp.training.checkpoint import BEFORE, LATEST, find_checkpoint, read_checkpoint
from minisaobp.training.loop import optimiser_for, train
from minisaobp.training.run import Interrupted, train_run
from tests import command_line
from tests.training.test_training import Copying, Settings, model_of

SETTINGS = Settings(steps=12, batch=4, peak_rate=1e-2, warmup=2)
ABOUT = {"options": {"seed": 0}}


def learning_everything():
    """A model with a learned lambda and the thresholds of a regulariser, all of which a checkpoint has to carry."""
    penalty = {"regulariser": "entropy", "regulariser_strength": 0.1}
    return model_of("high", learn_lam="layer", hidden_dropout_prob=0.1, **penalty)


def go(directory, batches=None, settings=SETTINGS, model=None, **changes):
    model = model or learning_everything()
    held_out = [Copying().batch(1000, 8)]
    lines = train_run(
        model, batches or Copying(), held_out, settings, directory, **{"every": 5, "about": ABOUT} | changes
    )
    return model, lines


def without_seconds(lines):
    return [{key: value for key, value in line.items() if not key.startswith("seconds")} for line in lines]


def test_what_a_run_leaves_behind(tmp_path):
    model, lines = go(tmp_path, beside={"tokenizer.json": b"{}"})
    assert sorted(os.listdir(tmp_path)) == ["best", BEFORE, LATEST, "last", "metrics.jsonl"]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == lines
    assert [line["step"] for line in lines] == [0, 5, 10, 12] and lines[0]["training_loss"] is None
    assert lines[-1]["held_out_perplexity"] == math.exp(lines[-1]["held_out_loss"])
    assert np.array_equal(from_pretrained(tmp_path / "last").parameters.flat, model.parameters.flat)
    for name in ("lam", "theta"):
        learned = model.parameters[f"bert.encoder.layer.0.attention.self.{name}"]
        assert (learned != np.float32({"lam": 0.2, "theta": 0.5}[name])).all()
    assert (tmp_path / "best" / "tokenizer.json").read_bytes() == b"{}"
    best = min(lines, key=lambda line: line["held_out_loss"])
    assert run.evaluate(from_pretrained(tmp_path / "best"), [Copying().batch(1000, 8)]).loss == best["held_out_loss"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", range(1, 60, 4))
def test_stopped_at_any_write_it_goes_on_bit_for_bit(tmp_path, monkeypatch, at):
    """Every file is renamed into place or appended to: the run stops before the n-th of these, as if it were killed."""
    (tmp_path / "whole").mkdir()
    whole, lines = go(tmp_path / "whole")
    count, replace, append = [0], os.replace, run.append_json

    def counted(function):
        def call(*arguments):
            count[0] += 1
            if count[0] == at:
                raise Stop
            function(*arguments)

        return call

    (tmp_path / "cut").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted(replace))
        patched.setattr(run, "append_json", counted(append))
        try:
            go(tmp_path / "cut")
        except Stop:
            pass
        else:
            assert count[0] < at  # all was written
    try:
        checkpoint, _ = find_checkpoint(tmp_path / "cut")
    except ValueError:  # stopped before there was any: it starts anew
        assert at < 15
        checkpoint = None
    resumed, again = go(tmp_path / "cut", checkpoint=checkpoint)
    assert np.array_equal(resumed.parameters.flat, whole.parameters.flat)
    assert without_seconds(again) == without_seconds(lines)
    for name in ("best", "last"):
        files = [(tmp_path / side / name / "model.safetensors").read_bytes() for side in ("whole", "cut")]
        assert files[0] == files[1]


def test_interrupt_ends_the_step_and_goes_on_bit_for_bit(tmp_path):
    class Pressing(Copying):
        def batch(self, number, size):
            if number == 6:
                signal.raise_signal(signal.SIGINT)
            return super().batch(number, size)

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, lines = go(tmp_path / "whole")
    with pytest.raises(Interrupted, match="Stopped after step 7"):
        go(tmp_path / "cut", Pressing())
    resumed, again = go(tmp_path / "cut", checkpoint=tmp_path / "cut" / LATEST)
    assert np.array_equal(resumed.parameters.flat, whole.parameters.flat)
    assert without_seconds(again) == without_seconds(lines)  # the mean training loss since step 5 too


def test_a_finished_run_goes_on_with_nothing(tmp_path):
    _, lines = go(tmp_path)
    before = (tmp_path / "last" / "model.safetensors").read_bytes()
    assert go(tmp_path, checkpoint=tmp_path / LATEST)[1] == lines
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"training diverges|held-out loss is"):
        go(tmp_path, settings=Settings(steps=50, batch=4, peak_rate=1e30, max_norm=1e30))
    assert find_checkpoint(tmp_path)[1]["steps"] == 0


def test_spoilt_weights_never_become_a_checkpoint(tmp_path, monkeypatch):
    """On a GPU loss and gradient are looked at now and then: Ctrl-C may come between the fault and the look."""

    def unwatched(model, batches, settings, optimiser):
        for step, (loss, seconds) in enumerate(train(model, batches, settings, optimiser)):
            if step == 6:
                model.parameters.flat[3] = np.nan
                signal.raise_signal(signal.SIGINT)
            yield loss, seconds

    monkeypatch.setattr(run, "train", unwatched)
    with pytest.raises(FloatingPointError, match="training diverges, lower the learning rate: before step 7"):
        go(tmp_path)
    assert find_checkpoint(tmp_path)[1]["steps"] == 5


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path):
    go(tmp_path)
    whole, described = (tmp_path / LATEST).read_bytes(), find_checkpoint(tmp_path)[1]
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"something else" * 100):
        (tmp_path / LATEST).write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"checkpoint.safetensors.*the one before it, of step 10, is whole: .*prev"
        ):
            find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / BEFORE)[1]["steps"] == 10
    go(tmp_path, checkpoint=tmp_path / BEFORE)  # what it offers works, and leaves a whole one before the next
    assert find_checkpoint(tmp_path)[1] == described and find_checkpoint(tmp_path / BEFORE)[1]["steps"] == 10
    (tmp_path / LATEST).unlink()
    assert find_checkpoint(tmp_path)[0] == tmp_path / BEFORE
    (tmp_path / BEFORE).write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"checkpoint.previous.safetensors cannot be read"):
        find_checkpoint(tmp_path)


def test_a_foreign_file_is_refused(tmp_path):
    save_file({"weights.a": np.zeros(3)}, tmp_path / LATEST)
    with pytest.raises(ValueError, match="is not a checkpoint of a training run"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        find_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        find_checkpoint(tmp_path / "empty")


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    from safetensors import safe_open

    go(tmp_path)
    with safe_open(tmp_path / LATEST, "np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / LATEST)
    name = "mean.bert.encoder.layer.0.output.dense.weight"
    model = learning_everything()
    for change, message in (
        ({name: np.zeros((3, 2), np.float32)}, rf"{name} is float32 of shape \(3, 2\), expected .* shape \(16, 32\)"),
        ({}, rf"has no tensor {name}, expected one of shape \(16, 32\)"),
    ):
        save_file({k: v for k, v in tensors.items() if k != name} | change, tmp_path / LATEST, metadata=metadata)
        with pytest.raises(ValueError, match=message + ".*; the one before it, of step 10, is whole"):
            read_checkpoint(tmp_path / LATEST, model.parameters, optimiser_for(model, SETTINGS))


def test_altered_numbers_are_noticed(tmp_path):
    go(tmp_path)
    content = bytearray((tmp_path / LATEST).read_bytes())
    content[-7] ^= 1
    (tmp_path / LATEST).write_bytes(content)
    model = learning_everything()
    with pytest.raises(ValueError, match="is damaged: its numbers are not those that were written; the one before"):
        read_checkpoint(tmp_path / LATEST, model.parameters, optimiser_for(model, SETTINGS))


def test_a_lost_log_changes_nothing_but_the_log(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    _, lines = go(tmp_path / "whole")
    for name, content in ((BEFORE, None), ("metrics.jsonl", b'5\n[]\n{"a": 1}\n\xff\n')):
        (tmp_path / "cut" / name).write_bytes(content or (tmp_path / "whole" / name).read_bytes())
    again = go(tmp_path / "cut", checkpoint=tmp_path / "cut" / BEFORE)[1]
    assert without_seconds(again) == without_seconds(lines[3:])


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    model = model_of()
    loss_and_gradients = type(model).loss_and_gradients

    def with_infinity(*arguments, **options):
        loss, gradients = loss_and_gradients(*arguments, **options)
        gradients.flat[3] = np.inf
        return loss, gradients

    monkeypatch.setattr(type(model), "loss_and_gradients", with_infinity)
    before = model.parameters.flat.copy()
    with pytest.raises(FloatingPointError, match=r"step 1 has loss .* and a gradient of length inf"):
        go(tmp_path, model=model)
    assert np.array_equal(model.parameters.flat, before)


SMALL = ["--layers", "1", "--width", "16", "--heads", "2", "--length", "16", "--batch", "2", "--vocabulary", "300"]


def command(*arguments):
    return [sys.executable, "-m", "minisaobp", "train", *map(str, arguments)]


@pytest.mark.parametrize("model", ["encoder", "decoder"])
def test_killed_again_and_again_it_ends_with_the_same_weights(tmp_path, model):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Sentence {n} says that {n * n} is its square." for n in range(99)))
    options = [*SMALL, "--model", model, "--variant", "high", "--corpus", tmp_path / "text.txt", "--steps", 250]
    options += ["--eval-every", 7]
    done = command_line.run("train", *options, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    kills, next_step = 0, command(*options, "--out", tmp_path / "cut")
    while kills < 4:
        process = subprocess.Popen(next_step, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log, before = tmp_path / "cut" / "metrics.jsonl", 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # until it has gone on for a while
            lines = log.read_text().count("\n") if log.exists() else 0
            before = before or lines
            if lines >= before + 5 and lines:
                break
            time.sleep(0.01)
        time.sleep(0.013 * kills)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
        next_step = command("--resume", tmp_path / "cut")
    assert kills >= 2
    done = subprocess.run(next_step, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("best/model.safetensors", "last/model.safetensors", "last/tokenizer.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [(tmp_path / side / "metrics.jsonl").read_text().splitlines() for side in ("whole", "cut")]
    assert without_seconds(map(json.loads, logs[0])) == without_seconds(map(json.loads, logs[1]))
    assert not list((tmp_path / "cut").rglob("*.part"))
