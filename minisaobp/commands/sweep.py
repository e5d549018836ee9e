"""sweep: all runs of a study, each once, and the table that compares them."""

import contextlib
import json
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path

from ..workers import Refused, spread
from . import finetune, options, pretrain, train

NAME, HELP = "sweep", "all runs of a study (variants, lambdas, rivals, seeds), and one table of them"
DESCRIPTION = (
    "Run a study: every arm of a TOML file with every seed. What is done is skipped; what was stopped, or killed, goes "
    "on. Every run adds a line to results.jsonl beside the file; at the end table.md compares the arms, with paired "
    "differences and their bootstrap intervals. README.md and minisaobp/sweep.py say what the file may hold."
)


def add(parser):
    add = parser.add_argument
    add("config", metavar="CONFIG.TOML", help="the study; results.jsonl and table.md are written beside it")
    add("--check", action="store_true", help="repeat the runs of the stage `check` and compare with what is recorded")
    add("--runs", metavar="DIR", help="for checkpoints and models (default: runs/sweep/ and the name of its folder)")
    add("--workers", metavar="N", type=options.whole(1, 1024), default=1,
        help="runs at a time, in processes that share the GPUs, or the cores (default: %(default)s)")  # fmt: skip
    options.add_device(parser)


def run(args, fail):
    from ..files import write_whole
    from ..sweep import STAGES, compare_arms, cut_results, read_results, result_of, study_of, table

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
    refuse = lambda problem: fail(f"{path}: {problem}")  # noqa: E731
    folder = Path(args.runs or Path("runs", "sweep", path.resolve().parent.name))
    runner = Runner(study, args, folder, refuse)
    for stage in STAGES:  # before any work
        for job in study.jobs(stage, results):
            runner.check_options(job)
    if args.check:
        _check(study, args, results, results_path, fail)
        return
    options.writable_folder(folder, (), fail)
    cut_results(results_path, size)
    for stage in STAGES:
        jobs = study.jobs(stage, results)
        try:
            left = [job for job in jobs if result_of(job, runner.configuration(job), results) is None]
        except ValueError as error:
            fail(f"{results_path}: {error}")
        _train_again(runner, study, left, args, results, refuse)
        done = len(jobs) - len(left)
        for number, (job, line) in enumerate(_results(runner, left, args, results, refuse), done + 1):
            _append(results_path, line)
            results.append(line)
            print(f"[{stage}: {number} of {len(jobs)}] {job.name}: {_summary(line)}", flush=True)
        for job in jobs:
            runner.forget_checkpoints(folder / job.folder)
    text = table(study, compare_arms(study, results), results)
    write_whole(table_path, lambda file: file.write(text.encode()))
    print(f"\n{text}\nWrote {results_path} and {table_path}; the models are in {folder}")


def _train_again(runner, study, jobs, args, results, refuse):
    """The models that are to be fine-tuned and are no longer there, such as those of another machine."""
    wanted = {job.options["checkpoint"] for job in jobs if job.task}
    trained = [job for stage in ("run", "check") for job in study.jobs(stage, results)]
    missing = [job for job in trained if job.folder in wanted and not (runner.folder / job.folder / "best").is_dir()]
    for number, (job, line) in enumerate(_results(runner, missing, args, results, refuse), 1):
        before = next(r for r in results if (r["stage"], r["arm"], r["seed"]) == (job.stage, job.arm, job.seed))
        same = "as recorded" if line["measures"] == before["measures"] else f"recorded: {_summary(before)}"
        print(f"[again: {number} of {len(missing)}] {job.name}: {_summary(line)}, {same}", flush=True)


def _results(runner, jobs, args, results, refuse):
    """(job, line) of every job as it ends: one after the other here, or in processes of their own."""
    if args.workers == 1:
        for job in jobs:
            print(f"\n{job.name}")
            yield job, runner.result(job, results)
        return
    gpus = ()
    if runner.xp.__name__ == "cupy":
        count = runner.xp.cuda.runtime.getDeviceCount()
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    for job in jobs:
        if job.task is None:
            _ = runner.text(runner.asked(job)).training  # the token file, once for all processes
    try:
        yield from spread(jobs, args.workers, _worker, (runner.study, args, runner.folder, results), gpus)
    except Refused as refusal:
        refuse(str(refusal))
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        raise


def _worker(study, args, folder, results):
    """In a process of `spread`: what makes a job its line; what it prints goes into output.txt in the run's folder."""

    def refuse(problem):
        raise Refused(problem)

    runner = Runner(study, args, folder, refuse)

    def work(job):
        place = folder / job.folder
        place.mkdir(parents=True, exist_ok=True)
        with (
            open(place / "output.txt", "a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            return runner.result(job, results)

    return work


def _summary(line):
    if line["failed"]:
        return line["failed"]
    measures = line["measures"]
    found = (
        f"dev score {measures['dev_score']:.4f}"
        if "dev_score" in measures
        else f"held-out loss {measures['held_out_loss']:.4f}"
    )
    return f"{found}, {line['seconds']:.0f} s"


def _append(path, line):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check(study, args, results, path, fail):
    """Repeat the runs of the check stages; what they find must lie within what the recorded ones differ by."""
    from ..sweep import result_of

    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(study, args, Path(folder), fail)
        stages = [jobs for jobs in map(study.jobs, ("check", "check-finetune")) if jobs]
        if not stages:
            fail("argument --check: the study has no stage check")
        try:
            recorded = [[result_of(job, runner.configuration(job), results) for job in jobs] for jobs in stages]
        except ValueError as error:
            fail(f"{path}: {error}")
        if any(line is None or line["failed"] for lines in recorded for line in lines):
            fail(f"argument --check: {path} has not all runs of the stage check; run the study first")
        for jobs, lines in zip(stages, recorded, strict=True):
            for job, before in zip(jobs, lines, strict=True):
                now = runner.result(job, results)
                for measure in before["measures"]:
                    values = [runner.mean(line, measure) for line in lines]
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
    """What turns a Job into a line of results.jsonl, and its runs into folders in `folder`."""

    def __init__(self, study, args, folder, fail):
        self.study, self.args, self.folder, self.fail = study, args, folder, fail
        self.xp = options.device_library(args, fail)
        self.texts = {}  # tokenised once for all runs
        self.examples = None, None  # of the last task, and what they are of

    def asked(self, job):
        """All options of the run, as its command completes them."""
        command = finetune if job.task else pretrain if "preset" in job.options else train
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        asked = command.complete(options.from_table(job.options, command.add, refuse), refuse)
        asked |= {"device": self.args.device, "precision": self.args.precision, "out": str(self.folder / job.folder)}
        if job.task:
            return asked | {"checkpoint": str(self.folder / job.options["checkpoint"])}
        return asked | {"tokens": asked["tokens"] or str(self.folder / "tokens")}

    def check_options(self, job):
        asked = self.asked(job)
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        if job.patch is not None and not Path(self.args.config).with_name(job.patch).is_file():
            refuse(f"patch: expected a Python file beside the study's, found no {job.patch}")
        if job.task:
            finetune.check_files(asked, refuse)
        else:
            config, _ = train.model_of(asked, 2**16, refuse)
            options.check_memory(config, asked["batch"], asked["length"], self.xp, refuse)

    def configuration(self, job):
        """What a result records of the options: nothing of the machine, paths as the study gives them."""
        paths = finetune.PATHS if job.task else train.PATHS
        asked = self.asked(job) | {name: job.options.get(name) for name in paths}
        configuration = {name: value for name, value in asked.items() if name not in ("out", "device", "precision")}
        return configuration | ({} if job.patch is None else {"patch": job.patch})

    def result(self, job, results):
        """Train, or go on, in its folder: the line of that run. results: the lines of other runs."""
        from ..results import commit, device_name, environment
        from ..training.run import Interrupted, lines_until

        folder = self.folder / job.folder
        folder.mkdir(parents=True, exist_ok=True)
        started, failed = time.monotonic(), None
        try:
            with self.patched(job):
                text, curves, measures = (self.tuned if job.task else self.trained)(job, folder, results)
        except ValueError as error:
            self.fail(f"{job.name}: {error}")
        except FloatingPointError as error:
            failed, measures, curves = str(error), {}, lines_until(folder / "metrics.jsonl", float("inf"))
            text = None
        except Interrupted as interrupt:
            print(f"\n{interrupt}\nThe same command goes on.", file=sys.stderr)
            raise
        return {
            "stage": job.stage,
            "arm": job.arm,
            "seed": job.seed,
            "configuration": self.configuration(job),
            "text": text,
            "commit": commit(),
            "device": device_name(self.xp),
            "precision": self.args.precision,
            "environment": environment(),
            "failed": failed,
            "seconds": round(time.monotonic() - started, 1),
            "curves": curves,
            "measures": measures,
        }

    def patched(self, job):
        """The context that the study's own Python file makes."""
        if job.patch is None:
            return contextlib.nullcontext()
        return runpy.run_path(str(Path(self.args.config).with_name(job.patch)))["patched"]()

    def trained(self, job, folder, results):
        """Fingerprint of the text, curves and final measures of a language model."""
        from ..sweep import final_measures

        asked = self.asked(job)
        text, configuration = self.text(asked), self.configuration(job)
        for other in results:
            same = all(other["configuration"].get(name) == configuration[name] for name in ("corpus", "held_out"))
            if same and other["text"] not in (None, text.fingerprint):
                self.fail(f"{job.name}: the text is not that of {other['arm']}, seed {other['seed']}, in the results")
        checkpoint, about = self.stopped({"options": asked, "text": text.fingerprint}, folder)
        curves = train.train_in_folder(asked, text, folder, self.xp, self.fail, checkpoint, about, self.measures(text))
        return text.fingerprint, curves, final_measures(curves) | self.of_decoder(curves, text, folder)

    def tuned(self, job, folder, results):
        """The same of a model that is fine-tuned for a task."""
        asked = self.asked(job)
        refuse = lambda problem: self.fail(f"{job.name}: {problem}")  # noqa: E731
        splits = finetune.splits_of(asked, refuse)
        fingerprint = finetune.fingerprint(splits)
        checkpoint, about = self.stopped({"options": asked, "data": fingerprint}, folder)
        model, tokenizer, length = finetune.model_of(asked, checkpoint is not None, self.xp, refuse)
        key = fingerprint, tokenizer.to_str(), length, asked["stride"]
        if self.examples[0] != key:
            self.examples = key, finetune.encoded(asked, splits, tokenizer, length)
        curves, record = finetune.finetune_in_folder(
            asked, model, tokenizer, splits, self.examples[1], folder, self.xp, checkpoint, about
        )
        measures = {
            f"{split}_{name}": value for split, scores in record["scores"].items() for name, value in scores.items()
        }
        dev = next(iter(record["scores"]))
        measures |= {f"dev_{name}": value for name, value in record["scores"][dev].items()}
        if record["majority"] is not None:
            measures["dev_majority"] = record["majority"]["score"]
        for name in ("entropy", "gtd", "indirect_entropy"):
            measures[name] = record["attention"][name]["layers"]
        return fingerprint, curves, measures

    def text(self, asked):
        key = json.dumps([asked[name] for name in (*train.PATHS, "length", "vocabulary", "model", "preset")])
        if key not in self.texts:
            try:
                self.texts[key] = train.text_of(asked, train.tokenizer_of(asked, False, self.fail))
            except ValueError as error:
                self.fail(f"corpus: {error}")
        return self.texts[key]

    def stopped(self, expected, folder):
        """The checkpoint of this very run in the folder, and what it says of the run; None, None without one.

        expected: what it must say."""
        from ..training.checkpoint import BEFORE, LATEST, find_checkpoint

        if not any((folder / name).exists() for name in (LATEST, BEFORE)):
            return None, None
        file, described = find_checkpoint(folder)
        about = described["about"]
        moved = {name: expected["options"][name] for name in ("device", "precision", "out")}
        if about | {"options": about.get("options", {}) | moved} != expected:
            self.fail(f"{folder} holds a run with other options; remove it, or name another folder by --runs")
        return file, about

    def measures(self, text):
        """A function from a model to the measures of its attention by layer, and to what it has learned of lambda and
        theta; None if the study asks for none."""
        from ..backend import to_host
        from ..diagnose import by_layer, graphs_by_layer
        from ..text.batches import in_order

        if not self.study.sequences:
            return None
        examples = text.held_out.rows(slice(0, self.study.sequences))

        def measures(model):
            found = by_layer(model, in_order(examples, 32), ("entropy", "indirect_entropy", "gtd", "sparsity"))
            if self.study.graphs:
                found |= graphs_by_layer(model, text.held_out.rows(slice(0, self.study.graphs)))
            for kind in ("lam", "theta"):
                learned = [to_host(v).tolist() for name, v in model.parameters.items() if name.endswith(f".{kind}")]
                found |= {kind: learned} if learned else {}
            return found

        return measures

    def of_decoder(self, curves, text, folder):
        """What is known of a decoder alone: its perplexity per word, and its loss where it sees no later token."""
        from ..nn import from_pretrained
        from ..training.loop import Score, evaluate, evaluate_from_prefixes

        if not text.causal:
            return {}
        last = curves[-1]
        score = Score(last["held_out_loss"], last["held_out_accuracy"], last["held_out_labels"])
        found = {"word_perplexity": score.perplexity_per(text.documents[1].words())}
        if self.study.prefixes:
            model = from_pretrained(folder / "last").on(self.xp)
            batch = text.held_out.rows(slice(0, self.study.prefixes))
            found["prefix_loss"] = evaluate_from_prefixes(model, batch).loss
            found["whole_loss"] = evaluate(model, [batch]).loss
        return found

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
