"""pretrain: a model of the paper on text, with the paper's settings; otherwise what `train` does."""

import argparse

from . import options, train

NAME, HELP = "pretrain", "train a model of the paper with its settings; --resume goes on with a run"
DESCRIPTION = (
    "Train a model of the paper's Table 4, by default with the steps, learning rate, warm-up and seed of its Table 5; "
    "the length of sequences and the batch are ours. The folder of the run is that of `train`."
)

# Table 5: steps, peak learning rate, steps of warm-up. The paper has none for its decoders (Appendix C), which are of
# the same sizes
SETTINGS = {"mini": (60_000, 5e-5, 3_000), "small": (150_000, 3e-4, 7_500), "medium": (245_000, 3e-4, 12_000)}
VOCABULARY = {"bert": 30_522, "gpt2": 50_257}
DEFAULTS = train.DEFAULTS | {
    "model": None,
    "layers": None,
    "width": None,
    "heads": None,
    "vocabulary": None,
    "length": 128,
    "batch": 32,
    "steps": None,
    "rate": None,
    "seed": 42,
    "out": "runs/pretrain",
}


def add(parser):
    of_the_paper = {
        "vocabulary": "30522, of a decoder 50257",
        "lam": "the paper's for that size",
        "steps": "of mini 60000, small 150000, medium 245000",
        "rate": "of mini 5e-5, of the others 3e-4",
        "warmup": "the paper's share of the steps: 3000, 7500, 12000 of its own",
    }
    shown = DEFAULTS | of_the_paper
    add = options.add_all(parser, shown)
    add("--preset", "the model (Table 4): bert-mini, bert-small, bert-medium, gpt2-mini, gpt2-small or gpt2-medium",
        metavar="NAME", type=_preset)  # fmt: skip
    train.add_others(parser, shown)


def _preset(text):
    from ..nn.config import PRESETS

    if text not in PRESETS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(PRESETS)}, got {text!r}")
    return text


def run(args, fail):
    train.work(args, fail, add, complete)


def complete(given, fail):
    """All options of a new run."""
    asked = DEFAULTS | given
    if asked["preset"] is None:
        fail("argument --preset: expected the name of a model, bert-mini for one; `train` trains other sizes")
    kind, size = asked["preset"].split("-")
    steps, rate, warmup = SETTINGS[size]
    for name, value in (("steps", steps), ("rate", rate), ("vocabulary", VOCABULARY[kind])):
        if asked[name] is None:
            asked[name] = value
    if asked["warmup"] is None:
        asked["warmup"] = asked["steps"] * warmup // steps
    return train.finished(asked, given, fail)
