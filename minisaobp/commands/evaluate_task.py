"""evaluate --task: a fine-tuned model's scores on a split, or those of a decoder that was never trained on the task."""

import sys

import numpy as np

from ..files import write_json, write_whole
from ..results import device_name, environment
from ..text.tasks import TASKS
from ..training.task import attention_on, predict, zero_shot
from . import options
from .task_data import described, dev_of, read_splits

MEASURED = 1024  # examples whose attention is measured


def evaluate_task(args, xp, fail):
    task = TASKS[args.task]
    if args.data is None:
        fail("argument --data: needed beside --task")
    if args.text is not None:
        fail("argument --text: not beside --task")
    split = args.split or dev_of(task)
    if split not in task.files or split.startswith("test"):
        known = ", ".join(name for name in task.files if not name.startswith("test"))
        fail(f"argument --split: expected one of {known} of {args.task}, got {split!r}")
    if args.zero_shot and task.prompt is None:
        able = ", ".join(name for name, other in TASKS.items() if other.prompt)
        fail(f"argument --zero-shot: expected one of the tasks {able}, got {args.task}")
    model, tokenizer, directory = options.opened(args.checkpoint, fail)
    _check_model(task, args, model, directory, fail)
    part = read_splits(task, args.data, (split,), {}, args.skip_bad, fail)[split]
    part = part._replace(examples=part.examples[: args.examples])
    out = None if args.out is None else options.writable_folder(args.out, ("metrics.json",), fail)
    print(f"{directory} on {task.title}\n{described(split, part)}")
    record = {
        "task": args.task,
        "title": task.title,
        "split": split,
        "checkpoint": str(directory),
        "environment": environment(),
        "device": device_name(xp),
        "parameters": model.parameters.flat.size,
        "data": part.record,
    }
    model = model.on(xp)
    found, predictions, done = (_zero_shot if args.zero_shot else _tuned)(task, model, tokenizer, part, args)
    examples = part.examples[:done]
    if done:
        found["majority"] = task.majority(examples)
        if found["majority"] is not None:
            print(f"the same answer for all: {found['majority']['score']:.4f}")
        if out is not None:
            name = task.submission.get(split)
            if name is not None:
                content = task.submit(examples, predictions, name)
                write_whole(out / name, lambda file: file.write(content))
            write_json(out / "metrics.json", record | found | {"complete": done == len(part.examples)})
            print(f"Wrote {out / 'metrics.json'}" + (f" and {out / name}" if name else ""))
    if done < len(part.examples):
        print(f"Stopped after {done:,} of {len(part.examples):,} examples", file=sys.stderr)
        raise KeyboardInterrupt


def _check_model(task, args, model, directory, fail):
    config = model.config
    if args.zero_shot:
        if config.model_type != "gpt2":
            fail(f"argument --zero-shot: expected a decoder, {directory} is an encoder with the head {config.head!r}")
    elif config.head != task.head or (task.head == "classification" and config.num_labels != len(task.labels)):
        classes = f" of {len(task.labels)} classes" if task.head == "classification" else ""
        fail(
            f"argument --checkpoint: expected a model with the head {task.head!r}{classes} (made by finetune), "
            f"{directory} has the head {config.head!r}"
            + (f" of {config.num_labels}" if config.head == "classification" else "")
        )
    if args.length is not None and args.length > config.max_position_embeddings:
        positions = config.max_position_embeddings
        fail(f"argument --length: expected at most the model's {positions} positions, got {args.length}")


def _tuned(task, model, tokenizer, part, args):
    length = args.length = args.length or min(task.length, model.config.max_position_embeddings)
    encoded = task.encode(part.examples, tokenizer, length)
    predictions = predict(model, encoded)
    scores, attention = task.score(part.examples, predictions), attention_on(model, encoded, MEASURED)
    print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    means = ", ".join(f"{name} {attention[name]['mean']:.3f}" for name in ("entropy", "gtd", "indirect_entropy"))
    print(f"attention on {attention['examples']:,} sequences: {means}")
    found = {"scores": scores, "attention": attention, "length": length, "cut": encoded.truncated}
    return found, predictions, len(part.examples)


def _zero_shot(task, model, tokenizer, part, args):
    length = args.length = args.length or model.config.max_position_embeddings
    plain, normalised, cut = zero_shot(model, tokenizer, task, part.examples, length)
    if not len(plain):
        return {}, plain, 0
    examples = part.examples[: len(plain)]
    scores = {
        "likelihood": task.score(examples, plain)["accuracy"],
        "likelihood_per_token": task.score(examples, normalised)["accuracy"],
    }
    chance = float(np.mean([1 / len(task.prompt(example)[1]) for example in examples]))
    print(
        f"accuracy {scores['likelihood']:.4f} by the likelihood of each choice, {scores['likelihood_per_token']:.4f} "
        f"by its likelihood per token; by chance {chance:.4f}\n{len(examples):,} examples, {cut:,} of them cut to "
        f"{length} tokens"
    )
    return {"zero_shot": scores, "chance": chance, "length": length, "cut": cut}, normalised, len(plain)
