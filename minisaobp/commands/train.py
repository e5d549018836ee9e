"""train: one encoder or decoder on text, in a folder from which it can go on at any time.

`pretrain` and `sweep` do the same work with other defaults, by the functions below.
"""

import argparse
import json
import os
import sys

from . import options

NAME, HELP = "train", "train an encoder or decoder of any size; --resume goes on with a run"
DESCRIPTION = (
    "Train a BERT-style encoder (masked language model) or a GPT-2-style decoder (causal language model) and write it "
    "into a folder: best/ and last/ model, metrics.jsonl, config.toml with all options, and a checkpoint to go on from."
)
DEFAULTS = {
    "model": "encoder",
    "layers": 4,
    "width": 128,
    "heads": 4,
    "preset": None,  # of `pretrain`, which decides all of these
    "corpus": None,
    "vocabulary": 2000,
    "variant": ["original"],
    "lam": None,
    "learn_lam": None,
    "regulariser": None,
    "regulariser_strength": None,
    "dropout": 0.1,
    "length": 64,
    "batch": 16,
    "accumulate": 1,
    "steps": 300,
    "rate": 1e-3,
    "warmup": None,
    "weight_decay": 0.01,
    "eval_every": None,
    "keep_models": False,
    "seed": 0,
    "device": "cpu",
    "precision": "float32",
    "out": "runs/train",
}


def add(parser):
    shown = DEFAULTS | {"warmup": "a tenth of all", "lam": 0.2}
    add, whole = adder(parser, shown), options.whole
    add("--model", "masked or causal language model", choices=["encoder", "decoder"])
    add("--layers", "blocks", type=whole(1, 10**4))
    add("--width", "model width", type=whole(1, 10**6))
    add("--heads", "heads, a divisor of the width", type=whole(1, 10**6))
    add_others(parser, shown)


def adder(parser, shown):
    """A function (name, help, ...) that adds an option; shown: what its help says of the default, {name: value}."""

    def add(name, help, **more):
        value = shown.get(name[2:].replace("-", "_"))
        if value is not None and value is not False:
            help += f" (default: {' '.join(value) if isinstance(value, list) else value})"
        # suppressed: beside --resume and --config it matters which options were given
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **more)

    return add


def add_others(parser, shown):
    """Every option but those of the model's size; shown: as of `adder`."""
    add, whole, real = adder(parser, shown), options.whole, options.real
    parser._negative_number_matcher = options.NEGATIVE_NUMBER
    add("--resume", "go on with the run in this folder, or from that checkpoint file; its options are the run's",
        metavar="PATH")  # fmt: skip
    add("--config", "a TOML file with options, their names as keys, such as the config.toml that every run writes; an "
        "option given beside it counts", metavar="FILE")  # fmt: skip
    add("--variant", "attention: one, or one per layer", nargs="+", type=options.variant, metavar="NAME")
    add("--lam", "lambda, strength of the Potts factor: one, or one per layer", nargs="+", type=options.lam)
    add("--learn-lam", "train lambda, one per layer or one per head (default: fixed)", choices=["layer", "head"])
    add("--regulariser", "a penalty added to the loss: on attention's entropy (Jha & Reagen 2025) or on the spectrum "
        "of queries and keys (Bao et al. 2024)", choices=["entropy", "eigen"])  # fmt: skip
    add("--regulariser-strength", "how much of it is added", type=real(0, 1e6))
    add("--dropout", "of embeddings, attention and residuals", type=real(0, 0.99))
    add("--corpus", "UTF-8 text files; the last tenth of each is held out (default: Python's own documentation)",
        nargs="+", metavar="FILE")  # fmt: skip
    add("--vocabulary", "pieces of the tokenizer, at most", type=whole(300, 10**6))
    add("--length", "tokens per sequence", type=whole(8, 10**5))
    add("--batch", "sequences that go through the model at a time", type=whole(1, 10**6))
    add("--accumulate", "batches whose gradients make one step", type=whole(1, 10**6))
    add("--steps", "training steps", type=whole(1, 10**9))
    add("--rate", "peak learning rate", type=real(0, 10))
    add("--warmup", "steps until the peak", type=whole(0, 10**9))
    add("--weight-decay", "of AdamW", type=real(0, 10))
    add("--eval-every", "steps between evaluations and checkpoints (default: a tenth of all)", type=whole(1, 10**9))
    add("--keep-models", "keep the model of every evaluation, in models/step-N, for `diagnose --run`",
        action="store_true")  # fmt: skip
    add("--seed", "of weights, batches, masks and dropout", type=options.seed)
    add(
        "--device", "where to compute: gpu needs CuPy, auto takes a GPU if there is one", choices=["cpu", "gpu", "auto"]
    )
    add("--precision", "of a GPU's matrix products: tf32 is faster and keeps 10 bits", choices=["float32", "tf32"])
    add("--out", "folder of the run", metavar="DIR")


def run(args, fail):
    work(args, fail, add, complete)


def work(args, fail, add, complete):
    """Train, as `train` or `pretrain` was asked to; add and complete: of that command."""
    from ..training.checkpoint import BEFORE, LATEST
    from ..training.run import Interrupted

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "resume", "config")}
    resume, config_file = vars(args).get("resume"), vars(args).get("config")
    if config_file is not None:
        if resume is not None:
            fail("argument --config: not beside --resume, whose options are the run's")
        given = options.from_toml(config_file, add, fail) | given
    if resume is None:
        asked, checkpoint, about = complete(given, fail), None, None
    else:
        asked, checkpoint, about = _resumed(resume, given, fail)
    xp = options.device_library(argparse.Namespace(**asked), fail)
    model_of(asked, 2**16, fail)  # before any work: what is wrong with the options is so for every vocabulary
    try:
        text = text_of(asked)
    except ValueError as error:
        fail(f"argument {'--corpus' if resume is None else '--resume, the text of the run'}: {error}")
    config, _ = model_of(asked, text.vocabulary, fail)
    options.check_memory(config, asked["batch"], asked["length"], xp, fail)
    if about is not None and about["text"] != text.fingerprint:
        fail(f"argument --resume: the text is not that of the run in {asked['out']!r}; expected the same files")
    out = options.writable_folder(asked["out"], ("run.json", "metrics.jsonl", "config.toml"), fail)
    for name in ("best", "last"):
        if (out / name).exists() and not (out / name).is_dir():
            fail(f"argument --out: {name} is a file in {asked['out']!r}, expected a folder or nothing")
    if resume is None and any((out / name).exists() for name in (LATEST, BEFORE)):
        fail(f"argument --out: {asked['out']!r} holds a run; go on with it by --resume {asked['out']}, or name another")
    try:
        lines = train_in_folder(asked, text, out, xp, fail, checkpoint, about)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except MemoryError as error:
        fail(
            f"not enough memory for --batch {asked['batch']} sequences of --length {asked['length']}: lower --batch "
            f"(and raise --accumulate, for the same steps) or --length; the last checkpoint is intact ({error})"
        )
    except Interrupted as interrupt:
        command = f"python -m minisaobp {args.command} --resume {asked['out']}"
        print(f"\n{interrupt}\nGo on with: {command}", file=sys.stderr)
        raise
    if not lines:
        print(f"The run is complete: models in {out / 'best'} and {out / 'last'}; its log is lost")
        return
    best = min(lines, key=lambda line: line["held_out_loss"])
    print(
        f"Best held-out loss {best['held_out_loss']:.3f}, perplexity {best['held_out_perplexity']:.1f}, at step "
        f"{best['step']}; models in {out / 'best'} and {out / 'last'}, the log in {out / 'metrics.jsonl'}"
    )


def text_of(asked):
    """The text of a run, a Dataset. Raises ValueError as `read_dataset` does."""
    from ..text.dataset import read_dataset

    return read_dataset(asked["corpus"], _is_causal(asked), asked["length"], asked["vocabulary"])


def train_in_folder(asked, text, out, xp, fail, checkpoint=None, about=None, measures=None):
    """Train what the options ask for on a text in the folder `out`, or go on from a checkpoint of that run.

    Returns the lines of metrics.jsonl; measures: as of `train_run`, which says what is raised. The folder also gets
    run.json and config.toml.
    """
    import numpy as np

    from ..files import write_json, write_whole
    from ..results import environment
    from ..training.loop import Settings
    from ..training.run import train_run

    config, model_class = model_of(asked, text.vocabulary, fail)
    model = model_class.initialise(config, np.random.default_rng([asked["seed"], 0])).on(xp)
    settings = Settings(
        steps=asked["steps"],
        batch=asked["batch"],
        peak_rate=asked["rate"],
        warmup=asked["warmup"],
        accumulate=asked["accumulate"],
        weight_decay=asked["weight_decay"],
        seed=asked["seed"],
    )
    about = about or {"options": asked, "text": text.fingerprint}
    print(
        f"{text.source}: {len(text.training.ids)} training and {len(text.held_out.ids)} held-out sequences of "
        f"{asked['length']} tokens, vocabulary {text.vocabulary}; {model.parameters.flat.size:,} parameters"
    )
    if checkpoint is None or not (out / "run.json").exists():
        record = about | {"environment": environment(), "corpus": text.summary}
        write_json(out / "run.json", record | {"parameters": model.parameters.flat.size})
        described = options.to_toml({name: value for name, value in asked.items() if name != "out"})
        write_whole(out / "config.toml", lambda file: file.write(described))
    return train_run(
        model,
        text.batches(asked["seed"]),
        text.held_out_batches(32),
        settings,
        out,
        every=asked["eval_every"],
        keep_models=asked["keep_models"],
        about=about,
        checkpoint=checkpoint,
        beside={"tokenizer.json": text.tokenizer.to_str().encode()},
        measures=measures,
    )


def complete(given, fail):
    """All options of a new run."""
    asked = DEFAULTS | given
    if asked["warmup"] is None:
        asked["warmup"] = asked["steps"] // 10
    return finished(asked)


def finished(asked):
    """The same with what does not depend on the command: the interval of evaluations, paths."""
    if asked["eval_every"] is None:
        asked["eval_every"] = max(1, asked["steps"] // 10)
    if asked["corpus"]:
        asked["corpus"] = [os.path.abspath(path) for path in asked["corpus"]]  # a resumed run may start elsewhere
    return asked


def _resumed(path, given, fail):
    """The options of the run that `path` belongs to, the checkpoint's file and what it says about the run."""
    from ..training.checkpoint import find_checkpoint

    try:
        file, description = find_checkpoint(path)
    except ValueError as error:
        fail(f"argument --resume: {error}")
    asked = description["about"].get("options", {}) | {"out": str(file.parent)}
    if asked.keys() != DEFAULTS.keys():
        fail(f"argument --resume: {file} is not of a run that `train` or `pretrain` started: its options are others")
    try:
        recorded = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["options"] | {"out": asked["out"]}
    except (OSError, ValueError, KeyError, TypeError):
        recorded = description["about"]["options"] | {"out": asked["out"]}  # lost, and written again
    if recorded != description["about"]["options"] | {"out": asked["out"]}:
        fail(f"argument --resume: {file} is a checkpoint of another run than {file.parent / 'run.json'}")
    for name, value in given.items():
        if name in ("device", "precision"):  # a run may move
            asked[name] = value
            continue
        wanted = [os.path.abspath(p) for p in value] if name == "corpus" else value
        if name == "out" and os.path.realpath(value) == os.path.realpath(file.parent):
            continue
        if wanted != asked[name]:
            option = name.replace("_", "-")
            fail(f"argument --{option}: expected that of the run, {json.dumps(asked[name])}, got {json.dumps(value)}")
    return asked, file, description["about"]


def _is_causal(asked):
    return asked["model"] == "decoder" or (asked["preset"] or "").startswith("gpt2")


def model_of(asked, vocabulary, fail):
    """Config and class of the model."""
    from ..nn import Config, preset
    from ..nn.model import MODELS

    one = {name: values[0] if values and len(values) == 1 else values for name, values in
           (("attention_variant", asked["variant"]), ("lam", asked["lam"]))}  # fmt: skip
    described = {
        "learn_lam": asked["learn_lam"],
        "hidden_dropout_prob": asked["dropout"],
        "attention_probs_dropout_prob": asked["dropout"],
        "attention_variant": one["attention_variant"],
        "regulariser": asked["regulariser"],
        "regulariser_strength": asked["regulariser_strength"] or 0.0,
    } | ({} if one["lam"] is None else {"lam": one["lam"]})
    try:
        if asked["preset"] is not None:
            config = preset(asked["preset"], vocabulary, **described)
        else:
            causal = asked["model"] == "decoder"
            config = Config(
                vocab_size=vocabulary,
                hidden_size=asked["width"],
                num_hidden_layers=asked["layers"],
                num_attention_heads=asked["heads"],
                intermediate_size=4 * asked["width"],
                max_position_embeddings=asked["length"],
                model_type="gpt2" if causal else "bert",
                **({"layer_norm_eps": 1e-5, "pad_token_id": None} if causal else {}),
                **described,
            )
    except ValueError as error:
        name, _, problem = str(error).partition(":")
        options_of = {"attention_variant": "variant", "num_attention_heads": "heads"}
        fail(f"argument --{options_of.get(name, name.replace('_', '-'))}:{problem}")
    if asked["length"] > config.max_position_embeddings:
        fail(
            f"argument --length: expected at most the {config.max_position_embeddings} positions of "
            f"{asked['preset']}, got {asked['length']}"
        )
    return config, MODELS[config.model_type]
