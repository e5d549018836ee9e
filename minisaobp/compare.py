"""One encoder trained once with each attention variant, from the same weights on the same batches, and compared."""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .backend import to_host
from .diagnose import by_layer
from .files import write_json
from .nn import Bert
from .results import device_name, environment
from .text.batches import in_order
from .text.dataset import HELD_OUT_MASKS, Dataset, read_dataset
from .training.loop import LOOK_EVERY, Settings, evaluate, optimiser_for, train

VOCABULARY = 2000
PEAK_RATE = 1e-3
BATCH_HELD_OUT = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """The text, and what the frequencies of its words alone would score."""

    text: Dataset
    unigram_loss: float  # cross-entropy of the held-out text in nats per token
    unigram_accuracy: float  # share of the most frequent token


def prepare(corpus, length):
    """The Task of the files `corpus`, or of Python's own documentation if there are none."""
    text = read_dataset(corpus, causal=False, length=length, vocab_size=VOCABULARY)
    ordinary = ~np.isin(np.arange(text.vocabulary), text.special)
    # add-one smoothing: a token that only the held-out text has must not cost infinity
    counts = np.where(ordinary, np.bincount(text.training.tokens.ids, minlength=text.vocabulary) + 1.0, 0)
    held_out = text.held_out.ids[ordinary[text.held_out.ids]]
    return Task(
        text=text,
        unigram_loss=float(-np.log(counts[held_out] / counts.sum()).mean()),
        unigram_accuracy=float((held_out == counts.argmax()).mean()),
    )


def run_variant(task, config, settings, report, xp=np):
    """Train and measure one variant. report(steps done) is called after each step. Returns its results as a dict."""
    seed, steps = settings["seed"], settings["steps"]
    model = Bert.initialise(config, np.random.default_rng([seed, 0])).on(xp)
    training = Settings(steps=steps, batch=settings["batch"], peak_rate=PEAK_RATE, warmup=steps // 10, seed=seed)
    losses, seconds = [], []
    with tqdm(total=steps, desc=f"{config.attention_variant:>8}", unit="step") as bar:
        for loss, taken in train(model, task.text.batches(seed), training, optimiser_for(model, training)):
            losses.append(loss)
            seconds.append(taken)
            report(len(losses))
            tokens = settings["batch"] * settings["length"]
            if isinstance(loss, float) or len(losses) % LOOK_EVERY == 0:
                bar.set_postfix_str(f"loss {float(loss):.3f}, {tokens / taken:,.0f} tokens/s", refresh=False)
            bar.update()
    score = evaluate(model, task.text.held_out_batches(BATCH_HELD_OUT))
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "accuracy": score.accuracy,
        "masked_tokens": score.labels,
        # of the text as it stands, nothing masked
        **by_layer(model, in_order(task.text.held_out, BATCH_HELD_OUT), ("entropy", "gtd", "indirect_entropy")),
        "seconds_per_step": quartiles[1],
        "seconds_per_step_quartiles": [quartiles[0], quartiles[2]],
        "training_loss": [float(loss) for loss in losses],
    }, _example_map(model, task)


def _example_map(model, task):
    """Attention of the last layer, mean over heads, on the first of the longest held-out sequences, (L, L)."""
    ids, valid = task.text.held_out.ids, task.text.held_out.attention_mask
    row = valid.sum(axis=1).argmax()
    return to_host(model.attention_maps(ids[row : row + 1, valid[row]]))[-1, 0].mean(axis=0)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; says what is on disk."""


def compare(task, configs, settings, out, xp=np):
    """Train every configuration {variant: Config}, print the table, write results.json and attention.png into `out`.

    results.json is rewritten after each variant, with "complete": false until the last, so an interrupted run keeps
    what it finished.
    """
    results = {
        "complete": False,
        "settings": settings,
        "environment": environment(),
        "device": device_name(xp),
        "corpus": task.text.summary
        # mean over the sequences of log(tokens), padding apart: what uniform attention would measure
        | {"uniform_entropy": float(np.log(task.text.held_out.attention_mask.sum(axis=1)).mean())},
        "parameters": Bert.parameter_count(next(iter(configs.values()))),
        "unigram": {
            "loss": task.unigram_loss,
            "perplexity": math.exp(task.unigram_loss),
            "accuracy": task.unigram_accuracy,
        },
        "variants": {},
    }
    path = Path(out) / "results.json"
    maps = {}
    for variant, config in configs.items():

        def report(steps, variant=variant):
            results["interrupted"] = {"variant": variant, "steps": steps}

        try:
            results["variants"][variant], maps[variant] = run_variant(task, config, settings, report, xp)
        except KeyboardInterrupt:
            if results["variants"] or not path.exists():
                write_json(path, results)
                raise Interrupted(f"What was finished is in {path}, marked incomplete.") from None
            raise Interrupted(f"{path} is that of an earlier run: nothing was finished in this one.") from None
        original = results["variants"].get("original")
        for row in results["variants"].values():
            row["ratio_to_original"] = row["seconds_per_step"] / original["seconds_per_step"] if original else None
        path.with_name("attention.png").unlink(missing_ok=True)  # an earlier run's
        write_json(path, results)
    results["complete"] = True
    results.pop("interrupted", None)
    write_json(path, results)
    return results, maps


def table(results):
    """The results as text: scores, then what each layer's attention looks like."""
    lines = [f"{'':>9}  {'loss':>6}  {'perplexity':>10}  {'accuracy':>8}  {'s/step':>7}  {'ratio':>6}"]
    lines.append(_score_line("unigram", results["unigram"]))
    lines += [_score_line(variant, row) for variant, row in results["variants"].items()]
    if not results["variants"]:
        return "\n".join(lines)
    layers = len(next(iter(results["variants"].values()))["entropy"])
    names = {"entropy": "entropy (nats)", "gtd": "GTD", "indirect_entropy": "indirect entropy (nats)"}
    width = max(6 * layers, 24)
    titles = "".join(f"  {f'{name}, layers 1 to {layers}':<{width + 12}}" for name in names.values())
    lines += ["", " " * 9 + titles.rstrip()]
    for variant, row in results["variants"].items():
        cells = ("".join(f"{value:6.3f}" for value in row[name]) for name in names)
        lines.append(f"{variant:>9}" + "".join(f"  {cell:<{width + 12}}" for cell in cells).rstrip())
    return "\n".join(lines)


def _score_line(name, row):
    line = f"{name:>9}  {row['loss']:6.3f}  {row['perplexity']:10.1f}  {row['accuracy']:8.1%}"
    if "seconds_per_step" not in row:
        return line
    ratio = row["ratio_to_original"]
    return f"{line}  {row['seconds_per_step']:7.3f}  {'-' if ratio is None else f'{ratio:.2f}':>6}"


def findings(results):
    """Sentences about what a reader of the table must know."""
    uniform = results["corpus"]["uniform_entropy"]
    lines = [
        f"Held-out loss in nats over {HELD_OUT_MASKS} maskings; one seed, so small differences between variants are "
        "noise.",
        f"GTD is 0.856 for the identity, the uniform matrix and a full collapse alike: read it with the indirect "
        f"entropy, which runs from 0 to {uniform:.2f} nats (uniform) here.",
    ]
    rows = results["variants"]
    if "original" in rows and "high" in rows:
        pairs = zip(rows["high"]["entropy"], rows["original"]["entropy"], strict=True)
        lower = [str(layer) for layer, (high, original) in enumerate(pairs, 1) if high < original]
        if lower:
            lines.append(
                f"Finding: the attention entropy of high is below that of original in layer {', '.join(lower)}, where "
                "the paper reports that BP-High keeps it up; one seed, a small model and few steps decide nothing."
            )
    for variant, row in rows.items():
        if row["loss"] > results["unigram"]["loss"] - 0.1:
            lines.append(
                f"Finding: {variant} did not get clearly (0.1 nats) under the unigram baseline: "
                f"{row['loss']:.3f} against {results['unigram']['loss']:.3f}."
            )
    return lines
