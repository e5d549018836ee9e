"""finetune: an encoder on a task, in a folder from which it can go on at any time."""

import argparse
import hashlib
import json
import os
import sys

from . import options

NAME, HELP = "finetune", "train an encoder on a task of the paper (GLUE, SQuAD, HellaSwag, RACE, BoolQ)"
DESCRIPTION = (
    "Fine-tune an encoder on a task: evaluated after each epoch, the best model kept in best/, its predictions in the "
    "task's submission format in predictions/, and metrics.json with scores, GTD and entropy of the dev set."
)
DEFAULTS = {
    "task": None,
    "data": None,
    "checkpoint": None,
    "train": None,
    "dev": None,
    "examples": None,
    "length": None,
    "stride": None,
    "batch": 32,
    "accumulate": 1,
    "epochs": 3,
    "rate": 1e-4,
    "warmup": None,
    "weight_decay": 0.01,
    "skip_bad": False,
    "measure": 1024,
    "seed": 0,
    "device": "cpu",
    "precision": "float32",
    "out": "runs/finetune",
}
PATHS = ("data", "checkpoint", "train", "dev")
NEEDED = ("task", "data", "checkpoint")


def add(parser):
    from ..text.tasks import TASKS

    whole = options.whole
    add = options.add_all(parser, DEFAULTS | {"warmup": "a tenth of all"})
    add("--resume", "go on with the run in this folder, or from that checkpoint file; its options are the run's",
        metavar="PATH")  # fmt: skip
    add("--task", "what to learn", choices=list(TASKS))
    add("--data", "folder with the official files: the task's own, or one above it (see data/README.md)", metavar="DIR")
    add("--checkpoint", "folder of a training run (its best model), or of a BERT with config.json, model.safetensors "
        "and a tokenizer", metavar="DIR")  # fmt: skip
    add("--train", "a file in place of the official one, in its format", metavar="FILE")
    add("--dev", "a file in place of the official one, in its format", metavar="FILE")
    add("--examples", "train on that many only, drawn by the seed (default: all)", type=whole(1, 10**9))
    add("--length", "tokens per sequence (default: 128, SQuAD 384, RACE 512, BoolQ 256, or all positions if fewer)",
        type=whole(16, 10**5))  # fmt: skip
    add("--stride", "SQuAD: context tokens between the beginnings of two windows (default: half a window)",
        type=whole(1, 10**5))  # fmt: skip
    add("--epochs", "passes over the examples", type=whole(1, 10**6))
    add("--skip-bad", "count lines that are not in the task's format, and go on", action="store_true")
    add("--measure", "dev examples whose attention is measured at the end", type=whole(1, 10**9))
    add("--seed", "of the head's weights, batches and dropout", type=options.seed)
    options.add_training(add)
    add("--out", "folder of the run", metavar="DIR")


def run(args, fail):
    from ..training.checkpoint import BEFORE, LATEST
    from ..training.run import Interrupted

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "resume")}
    resume = vars(args).get("resume")
    checkpoint = about = None
    if resume is None:
        asked = complete(given, fail)
    else:
        asked, checkpoint, about = options.resumed(resume, given, DEFAULTS, PATHS, NAME, fail)
    xp = options.device_library(argparse.Namespace(**asked), fail)
    model, tokenizer, length = model_of(asked, resume is not None, xp, fail)
    splits = splits_of(asked, fail)
    if about is not None and about["data"] != fingerprint(splits):
        fail(f"argument --resume: the examples are not those of the run in {asked['out']!r}; expected the same files")
    out = options.writable_folder(asked["out"], ("run.json", "metrics.jsonl", "metrics.json"), fail)
    if resume is None and any((out / name).exists() for name in (LATEST, BEFORE)):
        fail(f"argument --out: {asked['out']!r} holds a run; go on with it by --resume {asked['out']}, or name another")
    try:
        with options.enough_memory(asked, fail):
            examples = encoded(asked, splits, tokenizer, length)
            finetune_in_folder(asked, model, tokenizer, splits, examples, out, xp, checkpoint, about)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except Interrupted as interrupt:
        print(f"\n{interrupt}\nGo on with: python -m minisaobp finetune --resume {asked['out']}", file=sys.stderr)
        raise


def check_files(asked, fail):
    """Refuse, before any work, a task without its files."""
    from ..text.tasks import TASKS
    from .task_data import dev_of

    task = TASKS[asked["task"]]
    for split, own in (("train", "train"), (dev_of(task), "dev")):
        if asked[own] is not None:
            if not os.path.isfile(asked[own]):
                fail(f"argument --{own}: {asked[own]} is not a file")
        elif task.find(asked["data"], split) is None:
            fail(f"argument --data: {asked['data']} has no {task.where(split)} (plain, .gz or .xz)")


def check_model(asked, config, directory, fail):
    """Refuse the Config of a model that cannot be fine-tuned as it was asked for; directory: where it is."""
    positions = config.max_position_embeddings
    if config.model_type != "bert":
        fail(f"argument --checkpoint: expected an encoder, {directory} is a decoder (evaluate --zero-shot scores one)")
    if asked["length"] is not None and asked["length"] > positions:
        fail(f"argument --length: expected at most the model's {positions} positions, got {asked['length']}")


def splits_of(asked, fail):
    """{split: Split} of the task that a run asks for."""
    from ..text.tasks import TASKS
    from .task_data import dev_of, read_splits

    task = TASKS[asked["task"]]
    dev = dev_of(task)
    own = {split: asked[name] for split, name in (("train", "train"), (dev, "dev")) if asked[name]}
    return read_splits(task, asked["data"], ("train", dev), own, asked["skip_bad"], fail)


def fingerprint(splits):
    """A hash of what is trained on and of what is judged by."""
    digest = hashlib.sha256()
    for split, part in splits.items():
        if not split.startswith("test"):
            for example in part.examples:
                digest.update(json.dumps(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def encoded(asked, splits, tokenizer, length):
    """{split: TaskExamples or Windows} of `length` tokens, announced on the terminal."""
    from ..text.tasks import TASKS
    from .task_data import described

    task, made = TASKS[asked["task"]], {}
    for name, part in splits.items():
        made[name] = task.encode(part.examples, tokenizer, length, asked["stride"])
        print(described(name, part) + f", {made[name].truncated:,} of them cut to {length} tokens")
    return made


def finetune_in_folder(asked, model, tokenizer, splits, examples, out, xp, checkpoint=None, about=None):
    """Fine-tune a model with the task's head in the folder `out`, or go on from a checkpoint of that run.

    splits, examples: the same, as they were read and encoded. Returns the lines of metrics.jsonl and the content of
    metrics.json. Raises what `train_run` does.
    """
    from ..files import write_json
    from ..results import device_name, environment
    from ..text.batches import Batches
    from ..text.tasks import TASKS
    from ..training.loop import Settings
    from ..training.run import train_run
    from ..training.task import judging
    from .task_data import dev_of

    task = TASKS[asked["task"]]
    dev = dev_of(task)
    training = examples["train"]
    if asked["examples"] is not None:
        training = _Some(training, asked["examples"], asked["seed"])
    model = model.on(xp)
    settings, every = _settings(Settings, asked, training.count)
    print(
        f"{model.parameters.flat.size:,} parameters; {training.count:,} training sequences, {settings.steps} steps, "
        f"{every} in an epoch"
    )
    about = about or {"options": asked, "data": fingerprint(splits)}
    if checkpoint is None or not (out / "run.json").exists():
        machine = {"environment": environment(), "device": device_name(xp)}
        write_json(out / "run.json", about | machine | {"parameters": model.parameters.flat.size})
    lines = train_run(
        model,
        Batches(training, asked["seed"]),
        judging(task, splits[dev].examples, examples[dev]),
        settings,
        out,
        every=every,
        about=about,
        checkpoint=checkpoint,
        beside={"tokenizer.json": tokenizer.to_str().encode()},
    )
    best = max(lines, key=lambda line: line["dev_score"], default={})
    return lines, _finish(
        task, dev, out, xp, splits, examples, asked, {"step": best.get("step"), "steps_per_epoch": every}
    )


class _Some:
    """That many of the examples, drawn by the seed."""

    def __init__(self, examples, count, seed):
        import numpy as np

        self.examples, self.count = examples, min(count, examples.count)
        self.which = np.random.default_rng([seed, 0]).permutation(examples.count)[: self.count]

    def rows(self, which):
        return self.examples.rows(self.which[which])


def complete(given, fail):
    """All options of a new run."""
    missing = [f"--{name}" for name in NEEDED if name not in given]
    if missing:
        fail(f"the following arguments are required: {', '.join(missing)}, or --resume")
    asked = DEFAULTS | given
    return asked | {name: options.absolute(asked[name]) for name in PATHS}


def model_of(asked, going_on, xp, fail):
    """The model with the task's head, its tokenizer, and the length of a sequence; going_on: with the run's own."""
    from pathlib import Path

    import numpy as np

    from ..text.tasks import TASKS

    task = TASKS[asked["task"]]
    last = Path(asked["out"]) / "last"
    again = going_on and last.is_dir()  # the run's own, which has the head
    model, tokenizer, directory = options.opened(last if again else asked["checkpoint"], fail)
    check_model(asked, model.config, directory, fail)
    if not again:
        labels = 1 if task.head == "regression" else len(task.labels) if task.head == "classification" else 2
        model = model.with_head(task.head, np.random.default_rng([asked["seed"], 0]), labels)
    length = asked["length"] or min(task.length, model.config.max_position_embeddings)
    options.check_memory(model.config, asked["batch"] * (4 if task.head == "multiple_choice" else 1), length, xp, fail)
    return model, tokenizer, length


def _settings(kind, asked, examples):
    """Settings of the training, and the steps of an epoch."""
    every = -(-examples // (asked["batch"] * asked["accumulate"]))
    steps = every * asked["epochs"]
    return kind(
        steps=steps,
        batch=asked["batch"],
        peak_rate=asked["rate"],
        warmup=steps // 10 if asked["warmup"] is None else asked["warmup"],
        accumulate=asked["accumulate"],
        weight_decay=asked["weight_decay"],
        seed=asked["seed"],
    ), every


def _finish(task, dev, out, xp, splits, encoded, asked, best):
    """Scores, attention and predictions of the best model, written and printed; returns what metrics.json holds."""
    from ..files import write_json, write_whole
    from ..nn import from_pretrained
    from ..results import device_name, environment
    from ..training.task import attention_on, predict

    model = from_pretrained(out / "best").on(xp)
    scores, files = {}, {}
    for split, part in splits.items():
        if split == "train":
            continue
        predictions = predict(model, encoded[split])
        if not split.startswith("test"):
            scores[split] = task.score(part.examples, predictions)
        if split in task.submission:
            path = out / "predictions" / split / task.submission[split]
            path.parent.mkdir(parents=True, exist_ok=True)
            content = task.submit(part.examples, predictions, path.name)
            write_whole(path, lambda file, content=content: file.write(content))
            files[split] = str(path.relative_to(out))
    majority = task.majority(splits[dev].examples)
    attention = attention_on(model, encoded[dev], asked["measure"])
    missing = [split for split in task.files if split not in splits]
    record = {
        "task": asked["task"],
        "title": task.title,
        "options": asked,
        "environment": environment(),
        "device": device_name(xp),
        "parameters": model.parameters.flat.size,
        "splits": {
            split: part.record | {"sequences": encoded[split].count, "cut": encoded[split].truncated}
            for split, part in splits.items()
        },
        "missing_splits": missing,
        "best": best,
        "scores": scores,
        "majority": majority,
        "attention": attention,
        "predictions": files,
    }
    write_json(out / "metrics.json", record)
    for split, row in scores.items():
        line = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        same = "" if majority is None or split != dev else f"; the same answer for all: {majority['score']:.4f}"
        print(f"{task.title} {split}, {len(splits[split].examples):,} examples: {line}{same}")
    means = {name: attention[name]["mean"] for name in ("entropy", "gtd", "indirect_entropy")}
    print(
        f"attention on {attention['examples']:,} of its sequences: entropy {means['entropy']:.3f}, GTD "
        f"{means['gtd']:.3f}, indirect entropy {means['indirect_entropy']:.3f}"
    )
    if missing:
        print(f"Not there: {', '.join(missing)}")
    print(f"Wrote {out / 'metrics.json'} and {', '.join(str(out / file) for file in files.values())}")
    return record
