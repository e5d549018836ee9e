"""sweep: all runs of a study, each once, and the table that compares them."""

import json
import os
import sys
import tempfile
from pathlib import Path

from . import options, pretrain, train

NAME, HELP = "sweep", "all runs of a study (variants, lambdas, rivals, seeds), and one table of them"
DESCRIPTION = (
    "Run a study: every arm of a TOML file with every seed. What is done is skipped; what was stopped, or killed, goes "
    "on. Every run adds a line to results.jsonl beside the file; at the end table.md compares the arms, with paired "
    "differences and their bootstrap intervals. README.md and minisaobp/sweep.py say what the file may hold."
)
STAGES = ("search", "run", "check")


def add(parser):
    add = parser.add_argument
    add("config", metavar="CONFIG.TOML", help="the study; results.jsonl and table.md are written beside it")
    add("--check", action="store_true", help="repeat the runs of the stage `check` and compare with what is recorded")
    add("--runs", metavar="DIR", help="for checkpoints and models (default: runs/sweep/ and the name of its folder)")
    options.add_device(parser)


def run(args, fail):
    from ..files import write_whole
    from ..sweep import compare_arms, cut_results, read_results, result_of, study_of, table

    path = Path(args.config)
    results_path, table_path = path.with_name("results.jsonl"), path.with_name("table.md")
    content = options.read_toml(path, fail)
    try:
        study = study_of(content)
    except ValueError as error:
        fail(f"{path}: {error}")
    try:
        results, size = read_results(results_path)
    except ValueError as error:
        fail(str(error))
    runner = Runner(study, args, lambda problem: fail(f"{path}: {problem}"))
    for stage in STAGES:  # before any work
        for job in study.jobs(stage, results):
            runner.check_options(job)
    if args.check:
        _check(study, runner, results, results_path, fail)
        return
    folder = options.writable_folder(args.runs or Path("runs", "sweep", path.resolve().parent.name), (), fail)
    cut_results(results_path, size)
    total, number = sum(len(study.jobs(stage, results)) for stage in STAGES), 0
    for stage in STAGES:
        for job in study.jobs(stage, results):
            number += 1
            try:
                line = result_of(job, runner.configuration(job), results)
            except ValueError as error:
                fail(f"{results_path}: {error}")
            if line is None:
                print(f"\n[{number} of {total}] {job.name}")
                line = runner.result(job, folder / job.folder, results)
                _append(results_path, line)
                results.append(line)
            runner.forget_checkpoints(folder / job.folder)
    text = table(study, compare_arms(study, results), results)
    write_whole(table_path, lambda file: file.write(text.encode()))
    print(f"\n{text}\nWrote {results_path} and {table_path}; the models are in {folder}")


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check(study, runner, results, path, fail):
    """Repeat the runs of the stage check; what they find must lie within what the recorded ones differ by."""
    from ..sweep import MEASURES, result_of

    jobs = study.jobs("check")
    if not jobs:
        fail("argument --check: the study has no stage check")
    try:
        recorded = [result_of(job, runner.configuration(job), results) for job in jobs]
    except ValueError as error:
        fail(f"{path}: {error}")
    if None in recorded or any(line["failed"] for line in recorded):
        fail(f"argument --check: {path} has not all runs of the stage check; run the study first")
    wrong = []
    for job, before in zip(jobs, recorded, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            now = runner.result(job, Path(folder), results)
        for measure in MEASURES:
            if measure not in before["measures"]:
                continue
            values = [runner.mean(line, measure) for line in recorded]
            spread, was = max(values) - min(values), runner.mean(before, measure)
            found = None if now["failed"] else runner.mean(now, measure)
            good = found is not None and abs(found - was) <= spread
            verdict = "yes" if good else "NO"
            print(f"{job.name}: {measure} {found}, recorded {was}, seeds differ by {spread:.3g}: {verdict}")
            wrong += [] if good else [f"{measure} of seed {job.seed}"]
    if wrong:
        fail(f"--check: not within what the recorded runs differ by: {', '.join(wrong)}")
    print("Every number lies within what the recorded runs differ by")


class Runner:
    """What turns a Job into a line of results.jsonl."""

    def __init__(self, study, args, fail):
        self.study, self.args, self.fail = study, args, fail
        self.xp = options.device_library(args, fail)
        self.texts = {}  # tokenised once for all runs

    def asked(self, job):
        """All options of the run, as `train` or `pretrain` completes them."""
        command = pretrain if "preset" in job.options else train
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        asked = command.complete(options.from_table(job.options, command.add, refuse), refuse)
        return asked | {"device": self.args.device, "precision": self.args.precision}

    def check_options(self, job):
        asked = self.asked(job)
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        config, _ = train.model_of(asked, 2**16, refuse)
        options.check_memory(config, asked["batch"], asked["length"], self.xp, refuse)

    def configuration(self, job):
        """What a result records of the options: nothing of the machine, paths as the study gives them."""
        asked = self.asked(job) | {name: job.options.get(name) for name in train.PATHS}
        return {name: value for name, value in asked.items() if name not in ("out", "device", "precision")}

    def result(self, job, folder, results):
        """Train, or go on, in a folder: the line of that run."""
        from ..results import commit, device_name, environment
        from ..sweep import final_measures
        from ..training.run import Interrupted, lines_until

        asked = self.asked(job) | {"out": str(folder)}
        text = self.text(asked)
        configuration = self.configuration(job)
        for other in results:
            same = all(other["configuration"].get(name) == configuration[name] for name in ("corpus", "held_out"))
            if same and other["text"] != text.fingerprint:
                self.fail(f"{job.name}: the text is not that of {other['arm']}, seed {other['seed']}, in the results")
        folder.mkdir(parents=True, exist_ok=True)
        failed = None
        try:
            checkpoint, about = self.stopped(asked, text, folder)
            curves = train.train_in_folder(
                asked, text, folder, self.xp, self.fail, checkpoint, about, self.measures(text)
            )
        except ValueError as error:
            self.fail(f"{job.name}: {error}")
        except FloatingPointError as error:
            failed, curves = str(error), lines_until(folder / "metrics.jsonl", float("inf"))
        except Interrupted as interrupt:
            print(f"\n{interrupt}\nThe same command goes on.", file=sys.stderr)
            raise
        return {
            "stage": job.stage,
            "arm": job.arm,
            "seed": job.seed,
            "configuration": configuration,
            "text": text.fingerprint,
            "commit": commit(),
            "device": device_name(self.xp),
            "precision": asked["precision"],
            "environment": environment(),
            "failed": failed,
            "curves": curves,
            "measures": {} if failed else final_measures(curves),
        }

    def text(self, asked):
        key = json.dumps([asked[name] for name in (*train.PATHS, "length", "vocabulary", "model", "preset")])
        if key not in self.texts:
            try:
                self.texts[key] = train.text_of(asked, train.tokenizer_of(asked, False, self.fail))
            except ValueError as error:
                self.fail(f"corpus: {error}")
        return self.texts[key]

    def stopped(self, asked, text, folder):
        """The checkpoint of this very run in the folder, and what it says of the run; None, None without one."""
        from ..training.checkpoint import BEFORE, LATEST, find_checkpoint

        if not any((folder / name).exists() for name in (LATEST, BEFORE)):
            return None, None
        file, described = find_checkpoint(folder)
        about = described["about"]
        moved = {name: asked[name] for name in ("device", "precision", "out")}
        if about.get("options", {}) | moved != asked or about.get("text") != text.fingerprint:
            self.fail(f"{folder} holds a run with other options; remove it, or name another folder by --runs")
        return file, about

    def measures(self, text):
        """A function from a model to the measures of its attention by layer, and to what it has learned of lambda and
        theta; None if the study asks for none."""
        from ..backend import to_host
        from ..diagnose import by_layer
        from ..text.batches import in_order

        if not self.study.sequences:
            return None
        examples = text.held_out.rows(slice(0, self.study.sequences))

        def measures(model):
            found = by_layer(model, in_order(examples, 32), ("entropy", "indirect_entropy", "gtd", "sparsity"))
            for kind in ("lam", "theta"):
                learned = [to_host(v).tolist() for name, v in model.parameters.items() if name.endswith(f".{kind}")]
                found |= {kind: learned} if learned else {}
            return found

        return measures

    @staticmethod
    def mean(line, measure):
        import numpy as np

        return float(np.mean(line["measures"][measure]))

    @staticmethod
    def forget_checkpoints(folder):
        """Of a run whose line is written nothing goes on any more; its models stay."""
        from ..training.checkpoint import BEFORE, LATEST

        for name in (LATEST, BEFORE):
            (folder / name).unlink(missing_ok=True)
