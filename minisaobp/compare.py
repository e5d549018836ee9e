"""One encoder trained once with each attention variant, from the same weights on the same batches, and compared."""

import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import metrics
from .files import write_json
from .nn import Bert
from .results import environment
from .text.corpora import python_documentation, text_files
from .text.masking import mask_tokens, masked_batches
from .text.tokenizer import SPECIAL, pack, train_wordpiece
from .training.loop import evaluate, train

VOCABULARY = 2000
PEAK_RATE = 1e-3
HELD_OUT_MASKS = 4  # how often the held-out text is masked, each time elsewhere: more targets, less noise
BATCH_HELD_OUT = 32


@dataclasses.dataclass(frozen=True)
class Task:
    """Tokenised text, ready to train on, and what the words' frequencies alone would score."""

    source: str
    characters: tuple  # training, held out
    held_out_names: list
    vocabulary: int
    ids: np.ndarray  # (N, L) training sequences
    valid: np.ndarray  # (N, L)
    held_ids: np.ndarray  # (M, L)
    held_valid: np.ndarray  # (M, L)
    unigram_loss: float  # cross-entropy of the held-out text in nats per token
    unigram_accuracy: float  # share of the most frequent token


def prepare(corpus, length):
    """The Task of the files `corpus`, or of Python's own documentation if there are none."""
    training, held_out = text_files(corpus) if corpus else python_documentation()
    tokenizer = train_wordpiece(training, VOCABULARY)
    ids, valid = pack(training, tokenizer, length)
    held_ids, held_valid = pack(held_out, tokenizer, length)
    for what, rows in (("training", ids), ("held-out", held_ids)):
        tokens = int((rows >= len(SPECIAL)).sum())
        if tokens < length - 2:
            raise ValueError(
                f"the {what} text has {tokens} tokens, shorter than one sequence of --length {length} "
                f"({length - 2} tokens between [CLS] and [SEP])"
            )
    vocabulary = tokenizer.get_vocab_size()
    # add-one smoothing: a token that only the held-out text has must not cost infinity
    counts = np.bincount(ids[ids >= len(SPECIAL)], minlength=vocabulary) + 1.0
    counts[: len(SPECIAL)] = 0
    held_tokens = held_ids[held_ids >= len(SPECIAL)]
    return Task(
        source=", ".join(map(str, corpus)) if corpus else "the Python language reference (pydoc_data.topics)",
        characters=tuple(sum(len(text) for _, text in side) for side in (training, held_out)),
        held_out_names=[name for name, _ in held_out],
        vocabulary=vocabulary,
        ids=ids,
        valid=valid,
        held_ids=held_ids,
        held_valid=held_valid,
        unigram_loss=float(-np.log(counts[held_tokens] / counts.sum()).mean()),
        unigram_accuracy=float((held_tokens == counts.argmax()).mean()),
    )


def run_variant(task, config, settings, report):
    """Train and measure one variant. report(steps done) is called after each step. Returns its results as a dict."""
    model = Bert.initialise(config, np.random.default_rng([settings["seed"], 0]))
    batches = masked_batches(
        task.ids, task.valid, settings["batch"], task.vocabulary, np.random.default_rng([settings["seed"], 1])
    )
    losses, seconds = [], []
    steps = settings["steps"]
    with tqdm(total=steps, desc=f"{config.attention_variant:>8}", unit="step") as bar:
        for loss, taken in train(model, batches, steps=steps, peak_rate=PEAK_RATE, warmup=steps // 10):
            losses.append(loss)
            seconds.append(taken)
            report(len(losses))
            tokens = settings["batch"] * settings["length"]
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens / taken:,.0f} tokens/s", refresh=False)
            bar.update()
    rng = np.random.default_rng(0)  # the held-out task is the same for every seed
    held_out = [
        (*mask_tokens(task.held_ids[rows], task.vocabulary, rng), task.held_valid[rows])
        for _ in range(HELD_OUT_MASKS)
        for rows in _slices(len(task.held_ids))
    ]
    score = evaluate(model, held_out)
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "accuracy": score.accuracy,
        "masked_tokens": score.tokens,
        **_measures(model, task),
        "seconds_per_step": quartiles[1],
        "seconds_per_step_quartiles": [quartiles[0], quartiles[2]],
        "training_loss": losses,
    }, _example_map(model, task)


def _measures(model, task):
    """Per layer, mean over heads and held-out sequences of the text as it stands, nothing masked."""
    sums = {"entropy": 0, "gtd": 0, "indirect_entropy": 0}
    functions = (metrics.attention_entropy, metrics.gtd, metrics.indirect_entropy)
    for rows in _slices(len(task.held_ids)):
        valid = task.held_valid[rows]
        maps = model.attention_maps(task.held_ids[rows], valid)  # [layers, B, H, L, L]
        for name, function in zip(sums, functions, strict=True):
            sums[name] += function(maps, valid=valid[:, None]).mean(axis=2).sum(axis=1, dtype=np.float64)
    return {name: [float(x) for x in total / len(task.held_ids)] for name, total in sums.items()}


def _example_map(model, task):
    """Attention of the last layer, mean over heads, on the first of the longest held-out sequences, (L, L)."""
    row = task.held_valid.sum(axis=1).argmax()
    tokens = task.held_ids[row : row + 1, task.held_valid[row]]
    return model.attention_maps(tokens)[-1, 0].mean(axis=0)


def _slices(count):
    return [slice(a, a + BATCH_HELD_OUT) for a in range(0, count, BATCH_HELD_OUT)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training; says what is on disk."""


def compare(task, configs, settings, out):
    """Train every configuration {variant: Config}, print the table, write results.json and attention.png into `out`.

    results.json is rewritten after each variant, with "complete": false until the last, so an interrupted run keeps
    what it finished.
    """
    results = {
        "complete": False,
        "settings": settings,
        "environment": environment(),
        "corpus": {
            "source": task.source,
            "training_characters": task.characters[0],
            "held_out_characters": task.characters[1],
            "held_out": task.held_out_names,
            "vocabulary": task.vocabulary,
            "training_sequences": len(task.ids),
            "held_out_sequences": len(task.held_ids),
            # mean over the sequences of log(tokens), padding apart: what uniform attention would measure
            "uniform_entropy": float(np.log(task.held_valid.sum(axis=1)).mean()),
        },
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
            results["variants"][variant], maps[variant] = run_variant(task, config, settings, report)
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
