"""What each attention costs beside the original one, in training and in use: the paper's Table 9 with our code."""

import numpy as np

from .bench import step_of, summary, take_turns
from .files import write_json
from .nn import Bert, preset
from .results import device_name, provenance

VOCABULARY, LENGTH = 30522, 128
ARMS = {
    "original": {},
    "high": {"attention_variant": "high"},
    "low": {"attention_variant": "low"},
    "elemmul": {"attention_variant": "elemmul"},
    "entropy-reg": {"regulariser": "entropy", "regulariser_strength": 1e-2},
    "eigen-reg": {"regulariser": "eigen", "regulariser_strength": 1e-4},
}
# preset: sequences of a batch and turns, on a processor and on a GPU
SIZES = {
    "cpu": {"bert-mini": (8, 15)},
    "gpu": {"bert-mini": (128, 40), "bert-small": (128, 30), "bert-medium": (128, 20)},
}


def bench_cost(out, xp):
    """Print the tables and write them to `out` as JSON: seconds of a training step and of the scores of a batch."""
    results = {**provenance(), "device": device_name(xp), "vocabulary": VOCABULARY, "sizes": {}}
    for name, (batch, repeats) in SIZES["cpu" if xp is np else "gpu"].items():
        rows = _rows(name, batch, repeats, xp)
        results["sizes"][name] = {"batch": [batch, LENGTH], "repeats": repeats} | rows
        print(
            f"\n{name}, batch {batch} x {LENGTH}, vocabulary {VOCABULARY}, {repeats} turns: milliseconds, median "
            "(quartiles), and times `original`"
        )
        for what, of_arms in rows.items():
            for arm, row in of_arms.items():
                low, high = (1e3 * q for q in row["quartiles"])
                ratio = row["median"] / of_arms["original"]["median"]
                print(f"{what:>10} {arm:>12}  {1e3 * row['median']:8.2f}  ({low:.2f} to {high:.2f})  {ratio:.3f}")
    write_json(out, results)
    print(f"Wrote {out}")


def _rows(name, batch, repeats, xp):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, VOCABULARY, (batch, LENGTH))
    labels = np.where(rng.random(ids.shape) < 0.15, ids, -100)
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    arms = {arm: preset(name, VOCABULARY, **dropout, **options) for arm, options in ARMS.items()}
    training = {arm: step_of(config, ids, labels, xp=xp) for arm, config in arms.items()}
    inference = {arm: _scoring(config, ids, labels, xp) for arm, config in arms.items() if not config.regulariser}
    return {
        what: {
            arm: summary(seconds)
            for arm, seconds in take_turns({arm: _waited_for(f, xp) for arm, f in made.items()}, repeats).items()
        }
        for what, made in (("training", training), ("inference", inference))
    }


def _waited_for(function, xp):
    """The same function, at whose end a GPU has done its work."""

    def done():
        function()
        if xp is not np:
            xp.cuda.get_current_stream().synchronize()

    return done


def _scoring(config, ids, labels, xp):
    """A function that scores the masked tokens of a batch."""
    model = Bert.initialise(config, np.random.default_rng(0)).on(xp)
    return lambda: model.scored(ids, labels)
