"""A training run in a directory: evaluation every n steps, a log, the best and the last model, and checkpoints from
which it goes on bit for bit.

    run.json                       what was asked for, on which machine
    metrics.jsonl                  one line per evaluation
    best/, last/                   models that `from_pretrained` and transformers open
    models/step-N/                 the same of every evaluation, if they are kept
    checkpoint.safetensors         to go on from; checkpoint.previous.safetensors is the one before it
"""

import contextlib
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..backend import array_namespace
from ..files import append_json, unfinished, write_whole
from ..interrupts import interrupts
from .checkpoint import LATEST, read_checkpoint, write_checkpoint
from .loop import LOOK_EVERY, evaluate, optimiser_for, train

MODEL_FILES = ("config.json", "model.safetensors")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run, whose state is on disk."""


class Judgement(NamedTuple):
    """What an evaluation found."""

    values: dict  # for the line in metrics.jsonl
    loss: float  # the model with the least is the best
    sentence: str  # of it, for a reader


def train_run(
    model,
    batches,
    held_out,
    settings,
    directory,
    *,
    every,
    about,
    checkpoint=None,
    beside=None,
    keep_models=False,
    measures=None,
):
    """Train a model in a directory that exists; returns the lines of metrics.jsonl as dicts.

    batches, settings: as of `loop.train`. held_out: list of Batch, or a function model -> Judgement, for an evaluation
    at the start, every `every` steps and at the end; the model with the lowest loss then is in best/. about: JSON that
    every checkpoint carries. checkpoint: a file of this very run to go on from. beside: {name: bytes} of files that
    belong next to a model. keep_models: also keep the model of every evaluation. measures: a function from the model to
    JSON, which every line of the log gets under that name. Ctrl-C ends the step, writes a checkpoint and raises
    Interrupted; a second one stops at once, without a checkpoint. Raises FloatingPointError if training diverges, with
    the checkpoint before it intact.
    """
    judge = held_out if callable(held_out) else functools.partial(_judge, batches=held_out)
    directory = Path(directory)
    optimiser = optimiser_for(model, settings)
    best, interval, lines = math.inf, [0.0, 0, 0.0], []  # of the steps since an evaluation: losses, number, seconds
    if checkpoint is not None:
        described = read_checkpoint(checkpoint, model.parameters, optimiser)
        best, interval = math.inf if described["best"] is None else described["best"], described["interval"]
        lines = lines_until(directory / "metrics.jsonl", optimiser.steps)
    models = [directory / name / file for name in ("best", "last") for file in (*MODEL_FILES, *(beside or {}))]
    for path in (directory / "run.json", directory / "metrics.jsonl", directory / LATEST, *models):
        for leftover in unfinished(path):  # of a run that was killed while it wrote
            leftover.unlink()
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    write_whole(directory / "metrics.jsonl", lambda file: file.write(text))

    def keep():
        known = [float(interval[0]), *interval[1:]]
        weights = model.parameters.flat  # a GPU's may be spoilt by a gradient that nobody has looked at yet
        if not (math.isfinite(known[0]) and array_namespace(weights).isfinite(weights).all()):
            raise FloatingPointError(f"training diverges, lower the learning rate: before step {optimiser.steps}")
        state = {"about": about, "best": None if best == math.inf else best, "interval": known}
        write_checkpoint(directory, model.parameters, optimiser, state)

    def measure():
        nonlocal best, interval
        losses, steps, seconds = [float(interval[0]), *interval[1:]]
        found = judge(model)
        if not math.isfinite(found.loss):
            raise FloatingPointError(f"the held-out loss is {found.loss} after step {optimiser.steps}")
        training_loss = losses / steps if steps else None
        line = {"step": optimiser.steps, "training_loss": training_loss} | found.values
        line["seconds_per_step"] = seconds / steps if steps else None
        if measures is not None:
            line["measures"] = measures(model)
        lines.append(line)
        append_json(directory / "metrics.jsonl", line)
        names = ["last"]
        if found.loss < best:
            best = found.loss
            names.append("best")
        if keep_models:
            names.append(f"models/step-{optimiser.steps}")
        for name in names:
            _save_model(model, directory / name, beside or {})
        interval = [0.0, 0, 0.0]
        keep()  # last: what a run killed before it has written so far is written again, with the same content
        training = "" if training_loss is None else f"training loss {training_loss:.3f}, "
        tqdm.write(f"step {optimiser.steps}: {training}{found.sentence}")

    steps = train(model, batches, settings, optimiser)
    quiet = np.errstate(over="ignore", invalid="ignore", divide="ignore")  # loss and gradient are checked at every step
    with quiet, interrupts() as asked, tqdm(total=settings.steps, initial=optimiser.steps, unit="step") as bar:
        if checkpoint is None:
            measure()
        for loss, seconds in steps:
            interval = [interval[0] + loss, interval[1] + 1, interval[2] + seconds]
            if isinstance(loss, float) or optimiser.steps % LOOK_EVERY == 0:
                bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            bar.update()
            if optimiser.steps % every == 0 or optimiser.steps == settings.steps:
                measure()
            if asked() and optimiser.steps < settings.steps:
                keep()
                raise Interrupted(f"Stopped after step {optimiser.steps}; {directory / LATEST} goes on from there.")
    return lines


def _judge(model, batches):
    score = evaluate(model, tqdm(batches, desc="held-out", unit="batch", delay=2, leave=False))
    values = {
        "held_out_loss": score.loss,
        "held_out_perplexity": score.perplexity,
        "held_out_accuracy": score.accuracy,
        "held_out_labels": score.labels,
    }
    accuracy = "" if score.accuracy is None else f", accuracy {score.accuracy:.1%}"
    perplexity = "" if score.perplexity is None else f", perplexity {score.perplexity:.5g}"
    return Judgement(values, score.loss, f"held-out loss {score.loss:.3f}{perplexity}{accuracy}")


def lines_until(path, step):
    """The lines of a log up to that step; what a later, lost part of the run wrote is written again by this one."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                line = json.loads(text)
                if isinstance(line, dict) and line.get("step", math.inf) <= step:
                    lines.append(line)
    return lines


def _save_model(model, directory, beside):
    model.save_pretrained(directory)
    for name, content in beside.items():
        if not (directory / name).exists() or (directory / name).read_bytes() != content:
            write_whole(directory / name, lambda file, content=content: file.write(content))
