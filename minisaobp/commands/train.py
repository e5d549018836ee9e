"""train: one encoder or decoder on text, in a folder from which it can go on at any time.

`pretrain` and `sweep` do the same work with other defaults, by the functions below.
"""

import argparse
import dataclasses
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
    "held_out": None,
    "vocabulary": 2000,
    "tokenizer": None,
    "tokens": None,
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
PATHS = ("corpus", "held_out", "tokenizer", "tokens")


def add(parser):
    shown = DEFAULTS | {"warmup": "a tenth of all", "lam": 0.2}
    add, whole = options.add_all(parser, shown), options.whole
    add("--model", "masked or causal language model", choices=["encoder", "decoder"])
    add("--layers", "blocks", type=whole(1, 10**4))
    add("--width", "model width", type=whole(1, 10**6))
    add("--heads", "heads, a divisor of the width", type=whole(1, 10**6))
    add_others(parser, shown)


def add_others(parser, shown):
    """Every option but those of the model's size; shown: as of `options.add_all`."""
    add, whole, real = options.add_all(parser, shown), options.whole, options.real
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
    add("--corpus", "UTF-8 text files, plain, .gz or .xz, WikiText's too (default: Python's own documentation)",
        nargs="+", metavar="FILE")  # fmt: skip
    add("--held-out", "text files to evaluate on (default: the last tenth of each file of the corpus)",
        nargs="+", metavar="FILE")  # fmt: skip
    add("--vocabulary", "pieces of the tokenizer that is trained, at most", type=whole(300, 10**6))
    add("--tokenizer", "an existing one: vocab.txt, tokenizer.json, or a folder with one of them", metavar="PATH")
    add("--tokens", "folder for the corpus as tokens, made once and memory-mapped (default: tokens/ in --out)",
        metavar="DIR")  # fmt: skip
    add("--length", "tokens per sequence", type=whole(8, 10**5))
    add("--steps", "training steps", type=whole(1, 10**9))
    add("--eval-every", "steps between evaluations and checkpoints (default: a tenth of all)", type=whole(1, 10**9))
    add("--keep-models", "keep the model of every evaluation, in models/step-N, for `diagnose --run`",
        action="store_true")  # fmt: skip
    add("--seed", "of weights, batches, masks and dropout", type=options.seed)
    options.add_training(add)
    add("--out", "folder of the run", metavar="DIR")


def run(args, fail):
    work(args, fail, add, complete)


def work(args, fail, add, complete):
    """Train, as `train` or `pretrain` was asked to; add and complete: of that command."""
    from ..training.checkpoint import BEFORE, LATEST
    from ..training.loop import Score
    from ..training.run import Interrupted

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run", "resume", "config")}
    resume, config_file = vars(args).get("resume"), vars(args).get("config")
    if config_file is not None:
        if resume is not None:
            fail("argument --config: not beside --resume, whose options are the run's")
        from_file = options.from_toml(config_file, add, fail)
        if "tokenizer" in given:  # in place of the one that the file would have trained
            from_file.pop("vocabulary", None)
        given = from_file | given
    if resume is None:
        asked, checkpoint, about = complete(given, fail), None, None
    else:
        asked, checkpoint, about = options.resumed(resume, given, DEFAULTS, PATHS, "train` or `pretrain", fail)
    xp = options.device_library(argparse.Namespace(**asked), fail)
    model_of(asked, 2**16, fail)  # before any work: what is wrong with the options is so for every vocabulary
    tokenizer = tokenizer_of(asked, resume is not None, fail)
    try:
        text = text_of(asked, tokenizer)
    except ValueError as error:
        fail(f"argument {'--corpus' if resume is None else '--resume, the text of the run'}: {error}")
    config, _ = model_for(asked, text, fail)
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
        with options.enough_memory(asked, fail):
            lines = train_in_folder(asked, text, out, xp, fail, checkpoint, about)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except Interrupted as interrupt:
        command = f"python -m minisaobp {args.command} --resume {asked['out']}"
        print(f"\n{interrupt}\nGo on with: {command}", file=sys.stderr)
        raise
    if not lines:
        print(f"The run is complete: models in {out / 'best'} and {out / 'last'}; its log is lost")
        return
    best = min(lines, key=lambda line: line["held_out_loss"])
    perplexity = f"perplexity {best['held_out_perplexity']:.1f}"
    if config.model_type == "gpt2":
        score = Score(best["held_out_loss"], best["held_out_accuracy"], best["held_out_labels"])
        perplexity += f" per token and {score.perplexity_per(text.documents[1].words()):.1f} per word"
    print(
        f"Best held-out loss {best['held_out_loss']:.3f}, {perplexity}, at step "
        f"{best['step']}; models in {out / 'best'} and {out / 'last'}, the log in {out / 'metrics.jsonl'}"
    )


def tokenizer_of(asked, going_on, fail):
    """The existing tokenizer that a run asks for, None for one that is trained; going_on: with what the run has."""
    from ..text.packing import end_of_text
    from ..text.tokenizer import SpecialTokens, load_tokenizer

    if asked["tokenizer"] is None:
        return None
    try:
        last = os.path.join(asked["out"], "last")  # a run goes on with the tokenizer it began with
        tokenizer = load_tokenizer(last if going_on and os.path.isdir(last) else asked["tokenizer"])
        _ = end_of_text(tokenizer) if is_causal(asked) else SpecialTokens.of(tokenizer)  # which it must have
    except ValueError as error:
        fail(f"argument --tokenizer: {error}")
    return tokenizer


def text_of(asked, tokenizer):
    """The text of a run, a Dataset. Raises ValueError as `read_dataset` does."""
    from ..text.dataset import read_dataset

    return read_dataset(
        asked["corpus"],
        is_causal(asked),
        asked["length"],
        asked["vocabulary"],
        tokenizer,
        asked["held_out"],
        asked["corpus"] and (asked["tokens"] or os.path.join(asked["out"], "tokens")),
    )


def model_for(asked, text, fail):
    """Config and class of the model for a text."""
    config, model_class = model_of(asked, text.vocabulary, fail)
    if config.model_type == "bert":
        config = dataclasses.replace(config, pad_token_id=text.special.pad)
    return config, model_class


def train_in_folder(asked, text, out, xp, fail, checkpoint=None, about=None, measures=None):
    """Train what the options ask for on a text in the folder `out`, or go on from a checkpoint of that run.

    Returns the lines of metrics.jsonl; measures: as of `train_run`, which says what is raised. The folder also gets
    run.json and config.toml.
    """
    import numpy as np

    from ..files import write_json, write_whole
    from ..results import device_name, environment
    from ..training.loop import Settings
    from ..training.run import train_run

    config, model_class = model_for(asked, text, fail)
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
    try:
        training = text.training
    except (ValueError, OSError) as error:
        fail(f"argument --tokens: {error}")
    about = about or {"options": asked, "text": text.fingerprint}
    print(
        f"{text.source}: {training.count} training and {text.held_out.count} held-out sequences of "
        f"{asked['length']} tokens, vocabulary {text.vocabulary}; {model.parameters.flat.size:,} parameters\n"
        f"{training.documents} training documents, of which {training.documents_cut} go over the end of a sequence"
    )
    if checkpoint is None or not (out / "run.json").exists():
        record = about | {"environment": environment(), "device": device_name(xp), "corpus": text.summary}
        write_json(out / "run.json", record | {"parameters": model.parameters.flat.size})
        left_out = ("out", "vocabulary") if asked["tokenizer"] else ("out",)  # an existing one has its own
        described = options.to_toml({name: value for name, value in asked.items() if name not in left_out})
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
    return finished(asked, given, fail)


def finished(asked, given, fail):
    """The same with what does not depend on the command: the interval of evaluations, paths."""
    if asked["eval_every"] is None:
        asked["eval_every"] = max(1, asked["steps"] // 10)
    if asked["held_out"] and not asked["corpus"]:
        fail("argument --held-out: needs --corpus beside it")
    if asked["tokenizer"] and "vocabulary" in given:
        fail("argument --vocabulary: not beside --tokenizer, which has one")
    for name in PATHS:
        asked[name] = options.absolute(asked[name])  # a resumed run may start elsewhere
    return asked


def is_causal(asked):
    """Whether a decoder is asked for."""
    return asked["model"] == "decoder" or (asked["preset"] or "").startswith("gpt2")


def model_of(asked, vocabulary, fail):
    """Config and class of the model."""
    from ..nn import Config, preset
    from ..nn.model import MODELS

    if asked["regulariser"] is not None and asked["regulariser_strength"] is None:
        fail("argument --regulariser: needs --regulariser-strength beside it, a number above 0")
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
