"""The results of a study, one line of JSON for every run, and the table that compares its arms."""

import contextlib
import json
from pathlib import Path

import numpy as np

from .files import write_whole
from .study import STAGES, Job, best_rate

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
LINE = {  # what a line must have
    "stage": str, "arm": str, "seed": int, "configuration": dict, "text": str | None, "curves": list, "measures": dict,
    "failed": str | None,
}  # fmt: skip


def read_results(path):
    """The lines of results.jsonl, and how many bytes they take.

    Raises ValueError that names the line, also for a second one of the same run: files that were put together.
    """
    texts, size = whole_lines(path)
    lines, runs = [], {}
    for number, text in enumerate(texts, 1):
        try:
            line = _checked(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected the JSON of one run ({error})") from None
        first = runs.setdefault(_run_of_line(line), number)
        if first != number:
            raise ValueError(f"{path}, line {number}: the run of line {first} once more; expected one line for each")
        lines.append(line)
    return lines, size


def whole_lines(path):
    """The lines of a file that is not there or holds JSON, as bytes, and how many bytes they take: half a line at the
    end is of a run that was killed. A whole one needs no line end there: an editor may have taken it off."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return [], 0
    whole, end = content[: content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1 :]
    with contextlib.suppress(ValueError):
        json.loads(end)
        whole = content
    return whole.splitlines(), len(whole)


def _checked(line):
    """The same line. Raises ValueError if somebody has made something else of it."""
    if not isinstance(line, dict) or not LINE.keys() <= line.keys():
        raise ValueError("keys are missing")
    for name, kind in LINE.items():
        if not isinstance(line[name], kind):
            raise ValueError(f"{name} is {line[name]!r}")
    needed = [] if line["failed"] else ["dev_score" if task_of(line) else "held_out_loss"]
    if missing := [name for name in needed if name not in line["measures"]]:
        raise ValueError(f"measures has no {missing[0]}")
    if line["stage"] == "search" and type(line["configuration"].get("rate")) is not float:
        raise ValueError("configuration has no rate")
    for name, value in line["measures"].items():
        try:
            good = np.isfinite(np.mean(value))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(f"{name} is {value!r}")
    return line


def _run_of(stage, arm, seed, options):
    """What makes a run another one of the study."""
    return stage, arm, seed, options.get("task"), options["rate"] if stage == "search" else None


def _run_of_line(line):
    return _run_of(line["stage"], line["arm"], line["seed"], line["configuration"])


def _run_of_job(job):
    return _run_of(job.stage, job.arm, job.seed, job.options)


def line_of(job, results):
    """The line of that run, None if there is none."""
    return next((line for line in results if _run_of_line(line) == _run_of_job(job)), None)


def cut_results(path, size):
    """Make the file end with a line: without the half of one that a killed run has left behind."""
    if Path(path).exists():
        with open(path, "ab"):  # refused now rather than after the first run
            pass
        before = Path(path).read_bytes()
        content = before[:size] + b"\n" * (size > 0 and not before[:size].endswith(b"\n"))
        if content != before:
            write_whole(path, lambda file: file.write(content))


def result_of(job, configuration, results):
    """The line of that run, None if there is none.

    Raises ValueError if there is one with other settings: the two must not be mixed.
    """
    line = line_of(job, results)
    if line is None:
        return None
    recorded = line["configuration"]
    if recorded.get("patch") is not None:  # which older lines name only
        recorded = {"patch_sha256": configuration.get("patch_sha256")} | recorded
    for key in sorted(recorded.keys() | configuration.keys()):
        if recorded.get(key) != configuration.get(key):
            raise ValueError(
                f"{job.name} was run with {key} = {recorded.get(key)!r}, now it is {configuration.get(key)!r}; "
                "change it back, or put the results elsewhere"
            )
    return line


def task_of(line):
    """The task of a line of results, None of one that is about a language model."""
    return line["configuration"].get("task")


def final_measures(curves):
    """What the last evaluation of a run found, {name: number or a list with one per layer}."""
    last = curves[-1]
    numbers = {name: last[name] for name in ("held_out_loss", "held_out_perplexity", "held_out_accuracy")}
    return numbers | last.get("measures", {})


def _deviation(numbers):
    """Standard deviation of a sample; None of fewer than two."""
    with np.errstate(over="ignore"):  # infinite, of the perplexities of runs that all but diverge
        return float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None


def bootstrap_interval(differences, resamples=RESAMPLES):
    """95% percentile bootstrap interval of the mean of differences, one per seed; None of fewer than two.

    >>> [round(q, 2) for q in bootstrap_interval([-1.0, -2.0, -3.0])]
    [-3.0, -1.0]
    """
    if len(differences) < 2:
        return None
    rows = np.random.default_rng(0).integers(0, len(differences), (resamples, len(differences)))
    return np.quantile(np.asarray(differences)[rows].mean(axis=1), [0.025, 0.975]).tolist()


def t_interval(differences):
    """95% interval of the mean of differences, one per seed, by Student's t, which takes them for normal; None of fewer
    than two. Where two arms do not differ it misses zero one time in twenty, a bootstrap over five seeds one in six.

    >>> [round(q, 2) for q in t_interval([-1.0, -2.0, -3.0])]
    [-4.48, 0.48]
    """
    from scipy import stats

    if len(differences) < 2:
        return None
    mean, half = np.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return [float(mean - half), float(mean + half)]


def _split(study, results):
    """The lines of the runs that the study has, and those of others, which it had."""
    runs = {_run_of_job(job) for stage in STAGES for job in study.jobs(stage, results)}
    parts = [], []
    for line in results:
        parts[_run_of_line(line) not in runs].append(line)
    return parts


def _name(line):
    """That of its Job."""
    return Job(line["stage"], line["arm"], line["seed"], line["configuration"]).name


def compare_arms(study, results):
    """A row for every measure and arm: mean and standard deviation over seeds, the mean difference to the baseline over
    the seeds that both have, and its intervals by bootstrap and by t. Runs that failed are counted and have no part in
    it, runs that the study no longer has are left out.
    """
    rows, results = [], _split(study, results)[0]
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
                    "deviation": _deviation(numbers),
                    "pairs": len(pairs),
                    "difference": float(np.mean(pairs)) if pairs else None,
                    "interval": bootstrap_interval(pairs),
                    "t_interval": t_interval(pairs),
                }
            )
    return rows


def table(study, rows, results):
    """The rows as a Markdown table, aligned for a terminal too, with what one must know to read it."""
    titles = [
        "measure",
        "arm",
        "runs",
        "mean",
        "std. dev.",
        f"difference to {study.baseline}",
        "95% interval, bootstrap",
        "by t",
    ]
    cells = [titles]
    for row in rows:
        pairs = row["interval"], row["t_interval"]
        intervals = ["" if pair is None else "{:+.4g} to {:+.4g}".format(*pair) for pair in pairs]
        failed = f" + {row['failed']} failed" if row["failed"] else ""
        cells.append(
            [
                row["measure"].replace("_", " "),
                row["arm"],
                f"{row['runs']}{failed}",
                *("" if row[name] is None else f"{row[name]:.4g}" for name in ("mean", "deviation")),
                "" if row["difference"] is None else f"{row['difference']:+.4g}",
                *intervals,
            ]
        )
    widths = [max(len(line[n]) for line in cells) for n in range(len(titles))]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    notes = [
        "Of the last evaluation of every run, of a task the best epoch on its dev set; entropy, indirect entropy, GTD "
        "and sparsity are means over layers and heads. Differences are paired by seed; the intervals are a "
        "percentile bootstrap over seeds, which is too narrow where seeds are few, and Student's t, which takes the "
        "differences for normal."
    ]
    own, others = _split(study, results)
    if study.search:
        search, best = study.search, {arm: best_rate(study, arm, results) for arm in study.arms}
        ends = (min(search["rates"]), max(search["rates"]))
        learned = {r["arm"] for r in own if r["stage"] == "search" and not r["failed"]}
        rates = ", ".join(
            f"{arm} {rate:g}{' (an end of the range)' * (rate in ends)}"
            if arm in learned
            else f"{arm} {rate:g} (none is the best: every run of its search failed)"
            for arm, rate in best.items()
        )
        notes.append(
            f"Learning rates: the best of {', '.join(f'{rate:g}' for rate in search['rates'])} after {search['steps']} "
            f"steps, mean over {len(search['seeds'])} seed(s), the same search for every arm: {rates}."
        )
    failed = [f"- {_name(line)}: {line['failed']}" for line in results if line["failed"]]
    if others:
        notes.append(f"Not in the table, for the study no longer has them: {'; '.join(map(_name, others))}.")
    if failed:
        notes.append("\n".join(["Failed, and in no mean:", "", *failed]))
    return "\n".join([*lines, "", "\n\n".join(notes), ""])
