"""A study: training runs that differ in attention, lambda, regulariser and seed, from one TOML file, and what they say
together. What runs them is `commands/sweep.py`.

The stages of a study: "search" tries every learning rate of the file with every arm, each for the same number of steps;
"run" trains every arm with every seed, at the rate that its search found best; "finetune" takes the best model of these
runs to tasks; "check" and "check-finetune" are short runs for `--check` to repeat. An arm is one way of training: an
attention, or any options of `train` and `pretrain`. Its option `patch` names a Python file beside the study's whose
context manager `patched()` is open during its runs: for what belongs to one study and not into the package.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import write_whole

# what the table compares: of the last evaluation; those by layer as the mean over layers
MEASURES = (
    "held_out_loss",
    "held_out_perplexity",
    "held_out_accuracy",
    "word_perplexity",
    "prefix_loss",
    "entropy",
    "indirect_entropy",
    "gtd",
    "sparsity",
)
RESAMPLES = 10_000
STAGES = ("search", "run", "finetune", "check", "check-finetune")


class Job(NamedTuple):
    """One run: options are those of `train` or `pretrain`, or of `finetune`, as a TOML file would give them."""

    stage: str  # of STAGES
    arm: str
    seed: int
    options: dict
    patch: str | None = None

    @property
    def task(self):
        """What is fine-tuned for, None of a run that trains a language model."""
        return self.options.get("task")

    @property
    def name(self):
        rate = f", rate {self.options['rate']:g}" if self.stage == "search" else ""
        task = f"{self.task}, " if self.task else ""
        return f"{self.stage}: {task}{self.arm}{rate}, seed {self.seed}"

    @property
    def folder(self):
        rate = f"-rate-{self.options['rate']:g}" if self.stage == "search" else ""
        task = f"{self.task}-" if self.task else ""
        return f"{self.stage}/{task}{self.arm}{rate}-seed-{self.seed}"


class Study(NamedTuple):
    """What the TOML file says."""

    arms: dict  # {name: options}
    settings: dict  # options of every run
    seeds: list
    baseline: str  # the arm that differences are taken to
    sequences: int  # of the held-out text, whose attention every evaluation measures
    graphs: int  # of them, those whose token graphs it measures
    prefixes: int  # of them, those whose tokens a decoder is asked for from their prefixes alone, at the end
    search: dict | None  # rates, seeds, steps
    finetune: dict | None  # arms, seeds, settings, tasks
    check: dict | None  # arm, seeds, steps, other options, finetune

    def jobs(self, stage, results=()):
        """The runs of a stage in order: every arm before the next seed, so that what is done can be compared.

        results: of the runs that are done; the stage "run" takes the best rate of each arm from them.
        """
        if stage == "search" and self.search:
            return [
                self._job(stage, arm, seed, rate=rate, steps=self.search["steps"])
                for seed in self.search["seeds"]
                for arm in self.arms
                for rate in self.search["rates"]
            ]
        if stage == "run":
            rates = {arm: best_rate(self, arm, results) for arm in self.arms} if self.search else {}
            return [
                self._job(stage, arm, seed, **({"rate": rates[arm]} if arm in rates else {}))
                for seed in self.seeds
                for arm in self.arms
            ]
        if stage == "finetune" and self.finetune:
            return [
                self._finetune(stage, arm, seed, self.finetune["settings"] | options | {"task": task}, "run")
                for task, options in self.finetune["tasks"].items()
                for seed in self.finetune["seeds"]
                for arm in self.finetune["arms"]
            ]
        if stage.startswith("check") and self.check:
            short = {key: value for key, value in self.check.items() if key not in ("arm", "seeds", "finetune")}
            arm, seeds, tuned = self.check["arm"], self.check["seeds"], self.check.get("finetune")
            if stage == "check":
                return [self._job(stage, arm, seed, **short) for seed in seeds]
            return [self._finetune(stage, arm, seed, tuned, "check") for seed in seeds if tuned]
        return []

    def _job(self, stage, arm, seed, **changes):
        options = self.settings | self.arms[arm] | changes | {"seed": seed}
        patch = options.pop("patch", None)
        return Job(stage, arm, seed, options, patch)

    def _finetune(self, stage, arm, seed, options, trained):
        checkpoint = self._job(trained, arm, seed).folder
        return Job(stage, arm, seed, options | {"checkpoint": checkpoint, "seed": seed}, self.arms[arm].get("patch"))


def study_of(table):
    """The Study in a TOML file's table. Raises ValueError that names the key and what was expected.

    variants: names, or lists with one per layer; lams: the lambdas of those of them that have one; [arms.NAME]: further
    arms by their options. An option of an arm counts before that of [settings].

    >>> study = study_of({"variants": ["original", "high"], "lams": [0.1, 0.2], "seeds": [0, 1], "settings": {}})
    >>> list(study.arms), len(study.jobs("run"))
    (['original', 'high-lam0.1', 'high-lam0.2'], 6)
    """
    numbers = {"sequences": 64, "graphs": 0, "prefixes": 0}
    known = {"variants", "lams", "arms", "settings", "seeds", "baseline", "search", "finetune", "check", *numbers}
    for key in table:
        if key not in known:
            raise ValueError(f"{key}: no such key; expected some of {', '.join(sorted(known))}")
    variants, lams = _list(table, "variants", (str, list), []), _list(table, "lams", (int, float), [])
    arms = {}
    for variant in variants:
        name = "-".join(map(str, variant)) if isinstance(variant, list) else variant
        own_lams = lams if {"high", "low"} & set(variant if isinstance(variant, list) else [variant]) else []
        for lam in own_lams or [None]:
            arm = name if len(own_lams) < 2 else f"{name}-lam{lam:g}"
            if arm in arms:
                raise ValueError(f"variants: expected each once, got {arm} twice")
            arms[arm] = {"variant": variant} | ({} if lam is None else {"lam": lam})
    for name, options in _table(table, "arms").items():
        if name in arms or not isinstance(options, dict) or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"arms.{name}: expected options under a new name of letters, digits, - and _")
        arms[name] = options
    if not arms:
        raise ValueError("variants: expected at least one, or an arm")
    settings = _table(table, "settings")
    for where, options in [("settings", settings), *((f"arms.{name}", options) for name, options in arms.items())]:
        for option in ("seed", "out", "device", "precision", *["rate"] * ("search" in table)):
            if option in options:
                raise ValueError(f"{where}.{option}: not an option of one run of a study, which decides it")
    baseline = table.get("baseline", "original" if "original" in arms else next(iter(arms)))
    if baseline not in list(arms):  # a list has no hash
        raise ValueError(f"baseline: expected one of {', '.join(arms)}, got {baseline!r}")
    for name, default in numbers.items():
        numbers[name] = table.get(name, default)
        if type(numbers[name]) is not int or numbers[name] < 0:
            raise ValueError(f"{name}: expected a whole number >= 0, got {numbers[name]!r}")
    seeds = _list(table, "seeds", int, [0])
    search, check = _stage(table, "search", "rates"), _stage(table, "check", "arm")
    if search:
        if search.keys() != {"rates", "seeds", "steps"}:
            raise ValueError(f"search: expected rates, seeds and steps, got {', '.join(search)}")
        _list(search, "rates", (int, float), [])
    if check:
        if check["arm"] not in list(arms):
            raise ValueError(f"check.arm: expected one of {', '.join(arms)}, got {check['arm']!r}")
        if not isinstance(check.get("finetune", {}), dict):
            raise ValueError(f"check.finetune: expected a table, got {check['finetune']!r}")
    finetune = _finetune_of(table, arms, seeds) if "finetune" in table else None
    return Study(arms, settings, seeds, baseline, **numbers, search=search, finetune=finetune, check=check)


def _stage(table, name, own):
    """The table of a stage with seeds, steps and one key of its own; None if it is not there."""
    if name not in table:
        return None
    stage = _table(table, name)
    if not {own, "seeds", "steps"} <= stage.keys():
        raise ValueError(f"{name}: expected {own}, seeds and steps, got {', '.join(stage) or 'nothing'}")
    if type(stage["steps"]) is not int or stage["steps"] < 1:
        raise ValueError(f"{name}.steps: expected a whole number >= 1, got {stage['steps']!r}")
    _list(stage, "seeds", int, [])
    return stage


def _finetune_of(table, arms, seeds):
    """The table [finetune] with all its keys."""
    stage = {"arms": list(arms), "seeds": seeds, "settings": {}} | _table(table, "finetune")
    if stage.keys() != {"arms", "seeds", "settings", "tasks"}:
        raise ValueError(f"finetune: expected tasks, arms, seeds and settings, got {', '.join(table['finetune'])}")
    for name, all_of_them in (("arms", list(arms)), ("seeds", seeds)):
        _list(stage, name, (str, int), [])
        for value in stage[name]:
            if value not in all_of_them:
                raise ValueError(f"finetune.{name}: expected some of {', '.join(map(str, all_of_them))}, got {value!r}")
    _table(stage, "settings")
    for task in _table(stage, "tasks"):
        _table(stage["tasks"], task)
    return stage


def _table(table, key):
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key}: expected a table, got {value!r}")
    return value


def _list(table, key, kinds, default):
    """A list of distinct values of some kinds."""
    values = table.get(key, default)
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kinds) for v in values):
        raise ValueError(f"{key}: expected a list, got {values!r}")
    if key in table and (not values or any(values.count(value) > 1 for value in values)):
        raise ValueError(f"{key}: expected a list of distinct values, got {values!r}")
    return values


# ---- results: one line of JSON for every run -------------------------------------------------------------------------


def read_results(path):
    """The lines of results.jsonl, and how many bytes they take: half a line at the end is of a run that was killed.

    Raises ValueError that names the line.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    whole = content[: content.rfind(b"\n") + 1]
    lines = []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            if not {"stage", "arm", "seed", "configuration", "text", "curves", "measures", "failed"} <= line.keys():
                raise ValueError("keys are missing")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: expected the JSON of one run ({error})") from None
        lines.append(line)
    return lines, len(whole)


def cut_results(path, size):
    """Take off half a line that a killed run has left behind."""
    if Path(path).exists() and Path(path).stat().st_size > size:
        content = Path(path).read_bytes()[:size]
        write_whole(path, lambda file: file.write(content))


def result_of(job, configuration, results):
    """The line of that run, None if there is none.

    Raises ValueError if there is one with other settings: the two must not be mixed.
    """
    for line in results:
        recorded = line["configuration"]
        if (line["stage"], line["arm"], line["seed"], task_of(line)) != (job.stage, job.arm, job.seed, job.task):
            continue
        if job.stage == "search" and recorded["rate"] != configuration["rate"]:
            continue
        for key in sorted(recorded.keys() | configuration.keys()):
            if recorded.get(key) != configuration.get(key):
                raise ValueError(
                    f"{job.name} was run with {key} = {recorded.get(key)!r}, now it is {configuration.get(key)!r}; "
                    "change it back, or put the results elsewhere"
                )
        return line
    return None


def task_of(line):
    """The task of a line of results, None of one that is about a language model."""
    return line["configuration"].get("task")


def final_measures(curves):
    """What the last evaluation of a run found, {name: number or a list with one per layer}."""
    last = curves[-1]
    numbers = {name: last[name] for name in ("held_out_loss", "held_out_perplexity", "held_out_accuracy")}
    return numbers | last.get("measures", {})


def best_rate(study, arm, results):
    """The learning rate of the lowest mean loss over the seeds of the search; that of a failed run is infinite."""
    losses = {}
    for line in results:
        if (line["stage"], line["arm"]) == ("search", arm) and line["configuration"]["rate"] in study.search["rates"]:
            found = math.inf if line["failed"] else line["measures"]["held_out_loss"]
            losses.setdefault(line["configuration"]["rate"], []).append(found)
    # before the search nothing is known: the first is as good as any to check the options with
    return min(study.search["rates"], key=lambda rate: float(np.mean(losses.get(rate, [math.inf]))))


# ---- the table -------------------------------------------------------------------------------------------------------


def bootstrap_interval(differences, resamples=RESAMPLES):
    """95% percentile bootstrap interval of the mean of differences, one per seed; None of fewer than two.

    >>> [round(q, 2) for q in bootstrap_interval([-1.0, -2.0, -3.0])]
    [-3.0, -1.0]
    """
    if len(differences) < 2:
        return None
    rows = np.random.default_rng(0).integers(0, len(differences), (resamples, len(differences)))
    return np.quantile(np.asarray(differences)[rows].mean(axis=1), [0.025, 0.975]).tolist()


def compare_arms(study, results):
    """A row for every measure and arm: mean and standard deviation over seeds, the mean difference to the baseline over
    the seeds that both have, and its bootstrap interval. Runs that failed are counted and have no part in it.
    """
    rows = []
    tasks = [] if study.finetune is None else study.finetune["tasks"]
    for stage, task, measure in [*(("run", None, m) for m in MEASURES), *(("finetune", t, "dev_score") for t in tasks)]:
        lines_of = [r for r in results if r["stage"] == stage and task_of(r) == task]
        of_arm = {arm: [r for r in lines_of if r["arm"] == arm] for arm in study.arms}
        values = {
            arm: {r["seed"]: float(np.mean(r["measures"][measure])) for r in lines if measure in r["measures"]}
            for arm, lines in of_arm.items()
        }
        for arm, found in values.items():
            if not any(values.values()) or (task is not None and arm not in study.finetune["arms"]):
                continue
            base, numbers = values[study.baseline], list(found.values())
            pairs = [] if arm == study.baseline else [found[seed] - base[seed] for seed in found if seed in base]
            rows.append(
                {
                    "measure": measure if task is None else f"{task} {measure}",
                    "arm": arm,
                    "runs": len(numbers),
                    "failed": sum(r["failed"] is not None for r in of_arm[arm]),
                    "mean": float(np.mean(numbers)) if numbers else None,
                    "deviation": float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
                    "pairs": len(pairs),
                    "difference": float(np.mean(pairs)) if pairs else None,
                    "interval": bootstrap_interval(pairs),
                }
            )
    return rows


def table(study, rows, results):
    """The rows as a Markdown table, aligned for a terminal too, with what one must know to read it."""
    titles = ["measure", "arm", "runs", "mean", "std. dev.", f"difference to {study.baseline}", "95% interval"]
    cells = [titles]
    for row in rows:
        interval = "" if row["interval"] is None else "{:+.4g} to {:+.4g}".format(*row["interval"])
        failed = f" + {row['failed']} failed" if row["failed"] else ""
        cells.append(
            [
                row["measure"].replace("_", " "),
                row["arm"],
                f"{row['runs']}{failed}",
                *("" if row[name] is None else f"{row[name]:.4g}" for name in ("mean", "deviation")),
                "" if row["difference"] is None else f"{row['difference']:+.4g}",
                interval,
            ]
        )
    widths = [max(len(line[n]) for line in cells) for n in range(len(titles))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    notes = [
        "Of the last evaluation of every run, of a task the best epoch on its dev set; entropy, indirect entropy, GTD "
        "and sparsity are means over layers and heads. Differences are paired by seed; the intervals are percentile "
        "bootstraps over seeds, which are too narrow where seeds are few."
    ]
    if study.search:
        search, best = study.search, {arm: best_rate(study, arm, results) for arm in study.arms}
        ends = (min(search["rates"]), max(search["rates"]))
        rates = ", ".join(f"{arm} {rate:g}{' (an end of the range)' * (rate in ends)}" for arm, rate in best.items())
        notes.append(
            f"Learning rates: the best of {', '.join(f'{rate:g}' for rate in search['rates'])} after {search['steps']} "
            f"steps, mean over {len(search['seeds'])} seed(s), the same search for every arm: {rates}."
        )
    failed = [
        f"- {r['stage']}: {f'{task_of(r)}, ' * (task_of(r) is not None)}{r['arm']}, seed {r['seed']}: {r['failed']}"
        for r in results
        if r["failed"]
    ]
    if failed:
        notes.append("\n".join(["Failed, and in no mean:", "", *failed]))
    return "\n".join([*lines, "", "\n\n".join(notes), ""])
