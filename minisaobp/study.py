"""A study: training runs that differ in attention, lambda, regulariser and seed, from one TOML file. What
runs them is `commands/sweep.py` and `commands/sweep_runs.py`, what is made of their results stands in `sweep.py`.

The stages of a study: "search" tries every learning rate of the file with every arm, each for the same number of steps;
"run" trains every arm with every seed, at the rate that its search found best; "finetune" takes the best model of these
runs to tasks; "check" and "check-finetune" are short runs for `--check` to repeat. An arm is one way of training: an
attention, or any options of `train` and `pretrain`. Its option `patch` names a Python file beside the study's, or lists
several, whose context manager `patched()` is open during its runs, for what belongs to one study and not into the
package: `patch.py`.
"""

import math
from typing import NamedTuple

import numpy as np

CHECK_STAGES = ("check", "check-finetune")
STAGES = ("search", "run", "finetune", *CHECK_STAGES)


class Job(NamedTuple):
    """One run: options are those of `train` or `pretrain`, or of `finetune`, as a TOML file would give them."""

    stage: str  # of STAGES
    arm: str
    seed: int
    options: dict
    patch: str | list | None = None

    def __str__(self):
        return self.name

    @property
    def task(self):
        """What is fine-tuned for, None of a run that trains a language model."""
        return self.options.get("task")

    @property
    def name(self):
        rate = f", rate {self.options['rate']}" if self.stage == "search" else ""
        task = f"{self.task}, " if self.task else ""
        return f"{self.stage}: {task}{self.arm}{rate}, seed {self.seed}"

    @property
    def folder(self):
        rate = f"-rate-{self.options['rate']}" if self.stage == "search" else ""
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

    def trained(self, job, results=()):
        """The run whose model a job fine-tunes."""
        stage = {"finetune": "run", "check-finetune": "check"}[job.stage]
        return next(model for model in self.jobs(stage, results) if model.folder == job.options["checkpoint"])

    def _job(self, stage, arm, seed, **changes):
        options = self.settings | self.arms[arm] | changes | {"seed": seed}
        patch = options.pop("patch", None)
        return Job(stage, arm, seed, options, patch)

    def _finetune(self, stage, arm, seed, options, trained):
        model = self._job(trained, arm, seed)
        return Job(stage, arm, seed, options | {"checkpoint": model.folder, "seed": seed}, model.patch)


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
        taken = name.lower() in map(str.lower, arms)  # in a folder's name some systems tell no case
        if taken or not isinstance(options, dict) or not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"arms.{name}: expected options under a new name of letters, digits, - and _")
        arms[name] = options
    if not arms:
        raise ValueError("variants: expected at least one, or an arm")
    settings = _table(table, "settings")
    for where, options in [("settings", settings), *((f"arms.{name}", options) for name, options in arms.items())]:
        _refuse_own(where, options, *["rate"] * ("search" in table))
        if not isinstance(options.get("patch", ""), str):
            if not isinstance(options["patch"], list):
                raise ValueError(f"{where}.patch: expected the name of a file, or a list, got {options['patch']!r}")
            _list(options, "patch", str, [], f"{where}.")
    baseline = table.get("baseline", "original" if "original" in arms else next(iter(arms)))
    if baseline not in list(arms):  # a list has no hash
        raise ValueError(f"baseline: expected one of {', '.join(arms)}, got {baseline!r}")
    for name, default in numbers.items():
        numbers[name] = table.get(name, default)
        if type(numbers[name]) is not int or numbers[name] < 0:
            raise ValueError(f"{name}: expected a whole number >= 0, got {numbers[name]!r}")
    if numbers["graphs"] > numbers["sequences"]:
        raise ValueError(f"graphs: expected at most the {numbers['sequences']} sequences, got {numbers['graphs']}")
    seeds = _list(table, "seeds", int, [0])
    search, check = _stage(table, "search", "rates"), _stage(table, "check", "arm")
    if search:
        if search.keys() != {"rates", "seeds", "steps"}:
            raise ValueError(f"search: expected rates, seeds and steps, got {', '.join(search)}")
        _list(search, "rates", (int, float), [])
    if check:
        if check["arm"] not in list(arms):
            raise ValueError(f"check.arm: expected one of {', '.join(arms)}, got {check['arm']!r}")
        _refuse_own("check", check, "patch")
        _refuse_own("check.finetune", _table(check, "finetune", "check."), "checkpoint")
    finetune = _finetune_of(table, arms, seeds) if "finetune" in table else None
    return Study(arms, settings, seeds, baseline, **numbers, search=search, finetune=finetune, check=check)


def _refuse_own(where, options, *more):
    """What the study decides itself is no option of its runs."""
    for option in ("seed", "out", "device", "precision", *more):
        if option in options:
            raise ValueError(f"{where}.{option}: not an option of one run of a study, which decides it")


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
    _refuse_own("finetune.settings", _table(stage, "settings", "finetune."), "task", "checkpoint")
    for task in _table(stage, "tasks", "finetune."):
        where = "finetune.tasks."
        _refuse_own(where + task, _table(stage["tasks"], task, where), "task", "checkpoint")
    return stage


def _table(table, key, where=""):
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{where}{key}: expected a table, got {value!r}")
    return value


def _list(table, key, kinds, default, where=""):
    """A list of distinct values of some kinds."""
    values = table.get(key, default)
    if not isinstance(values, list) or any(isinstance(v, bool) or not isinstance(v, kinds) for v in values):
        raise ValueError(f"{where}{key}: expected a list, got {values!r}")
    if key in table and (not values or any(values.count(value) > 1 for value in values)):
        raise ValueError(f"{where}{key}: expected a list of distinct values, got {values!r}")
    return values


def best_rate(study, arm, results):
    """The learning rate of the lowest mean loss over the seeds of the search; that of a failed run is infinite. Among
    equals, and where every run has failed, it is the lowest, which is the least likely to diverge in a longer run.
    """
    losses = {}
    for line in results:
        if (line["stage"], line["arm"]) == ("search", arm) and line["seed"] in study.search["seeds"]:
            found = math.inf if line["failed"] else line["measures"]["held_out_loss"]
            losses.setdefault(line["configuration"]["rate"], []).append(found)
    # before the search nothing is known, and any would do to check the options with
    return min(sorted(study.search["rates"]), key=lambda rate: float(np.mean(losses.get(rate, [math.inf]))))
