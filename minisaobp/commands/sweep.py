"""sweep: all runs of a study, each once, and the table that compares them."""

import contextlib
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

from ..workers import Refused, spread
from . import options, train
from .sweep_runs import Runner

NAME, HELP = "sweep", "all runs of a study (variants, lambdas, rivals, seeds), and one table of them"
DESCRIPTION = (
    "Run a study: every arm of a TOML file with every seed. What is done is skipped; what was stopped, or killed, goes "
    "on. Every run adds a line to results.jsonl beside the file, or, if it is done again for a model, to again.jsonl; "
    "at the end table.md compares the arms, with paired differences and their bootstrap intervals. README.md and "
    "minisaobp/study.py say what the file may hold."
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
    with contextlib.ExitStack() as held:
        _run(args, fail, held)


def _run(args, fail, held):
    from ..files import append_json, write_whole
    from ..study import CHECK_STAGES, STAGES, study_of
    from ..sweep import compare_arms, cut_results, read_results, result_of, table, whole_lines

    path = Path(args.config)
    results_path, again_path, table_path = (path.with_name(n) for n in ("results.jsonl", "again.jsonl", "table.md"))
    content = options.read_toml(path, fail)
    try:
        study = study_of(content)
    except ValueError as error:
        fail(f"{path}: {error}")
    if not args.check:
        _keep_others_out(held, path.parent, fail)  # before the results are read: what another adds is not done again
    try:
        results, size = read_results(results_path)
    except ValueError as error:
        fail(str(error))
    refuse = lambda problem: fail(f"{path}: {problem}")  # noqa: E731
    folder = Path(args.runs or Path("runs", "sweep", path.resolve().parent.name))
    runner = Runner(study, args, folder, options.device_library(args, fail), refuse)
    for stage in CHECK_STAGES if args.check else STAGES:  # before any work
        for job in study.jobs(stage, results):
            runner.check_options(job)
    if study.prefixes and not any(train.is_causal(runner.asked(job)) for job in study.jobs("run", results)):
        refuse("prefixes: of decoders alone, and the study has none")
    if args.check:
        _check(study, args, runner.xp, results, results_path, fail)
        return
    written = (results_path.name, again_path.name, table_path.name)
    options.writable_folder(path.parent, written, fail, "argument CONFIG.TOML")
    options.writable_folder(folder, (), fail, "argument --runs")
    if not folder.samefile(path.parent):
        _keep_others_out(held, folder, fail)
    cut_results(results_path, size)
    cut_results(again_path, whole_lines(again_path)[1])
    for stage in STAGES:
        jobs = study.jobs(stage, results)
        try:
            left = [job for job in jobs if result_of(job, runner.configuration(job), results) is None]
        except ValueError as error:
            fail(f"{results_path}: {error}")
        for line in _trained_again(runner, study, left, args, results, refuse):
            listed = [*(json.dumps(one).encode() for one in results), *whole_lines(again_path)[0]]
            if json.dumps(line).encode() not in listed:  # it is, if the sweep ended before the checkpoint was removed
                append_json(again_path, line)
        done = len(jobs) - len(left)
        for number, (job, line) in enumerate(_results(runner, left, args, results, refuse), done + 1):
            append_json(results_path, line)
            results.append(line)
            runner.forget_checkpoints(job)
            print(f"[{stage}: {number} of {len(jobs)}] {job.name}: {_summary(line)}", flush=True)
    text = table(study, compare_arms(study, results), results)
    write_whole(table_path, lambda file: file.write(text.encode()))
    print(f"\n{text}\nWrote {results_path} and {table_path}; the models are in {folder}")


def _keep_others_out(held, folder, fail):
    """From here to the end of `held` no other sweep writes into the folder."""
    from ..files import alone_in

    try:
        held.enter_context(alone_in(folder))
    except BlockingIOError:
        fail(f"another sweep is at work in {folder}; wait for its end, or stop it")


def _trained_again(runner, study, jobs, args, results, refuse):
    """Train the models that are to be fine-tuned and are no longer there, as on another machine; yields their lines."""
    from ..sweep import line_of

    wanted = {job.options["checkpoint"] for job in jobs if job.task}
    trained = [job for stage in ("run", "check") for job in study.jobs(stage, results) if job.folder in wanted]
    recorded = {job.folder: line_of(job, results) for job in trained}  # their stages are over, and were compared
    missing = [
        job for job in trained if not recorded[job.folder]["failed"] and not runner.has_model(job, recorded[job.folder])
    ]
    for number, (job, line) in enumerate(_results(runner, missing, args, results, refuse), 1):
        yield line
        before = recorded[job.folder]
        if line["failed"]:
            refuse(f"{job.name}, trained again for its tasks: {line['failed']}; recorded: {_summary(before)}")
        runner.forget_checkpoints(job)
        same = before["measures"].items() <= line["measures"].items()  # an older line may not have them all
        compared = "as recorded" if same else f"recorded: {_summary(before)}"
        print(f"[again: {number} of {len(missing)}] {job.name}: {_summary(line)}, {compared}", flush=True)


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
            try:
                with runner.in_force(job):
                    _ = runner.text(job).training  # the token file, once for all processes
            except ValueError as error:
                refuse(f"{job.name}: {error}")
    try:
        yield from spread(jobs, args.workers, _worker, (runner.study, args, runner.folder, results), gpus)
    except Refused as refusal:
        refuse(str(refusal))
    except KeyboardInterrupt:
        if not args.check:  # which begins anew
            print("\nStopped; the same command goes on.", file=sys.stderr)
        raise


def _worker(study, args, folder, results):
    """In a process of `spread`: what makes a job its line; what it prints goes into output.txt in the run's folder."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is one for many processes, which outlives one that is killed

    def refuse(problem):
        raise Refused(problem)

    runner = Runner(study, args, folder, options.device_library(args, refuse), refuse)

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
    steps = itertools.pairwise(line["curves"])  # they know of every sitting, the clock only of this one
    seconds = sum((now["step"] - before["step"]) * now["seconds_per_step"] for before, now in steps)
    return f"{found}, {seconds:.0f} s of training"


def _check(study, args, xp, results, path, fail):
    """Repeat the runs of the check stages; what they find must lie within what the recorded ones differ by."""
    from ..study import CHECK_STAGES
    from ..sweep import result_of

    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(study, args, Path(folder), xp, fail)
        stages = [jobs for jobs in map(study.jobs, CHECK_STAGES) if jobs]
        if not stages:
            fail("argument --check: the study has no stage check")
        try:
            recorded = [[result_of(job, runner.configuration(job), results) for job in jobs] for jobs in stages]
        except ValueError as error:
            fail(f"{path}: {error}")
        if any(line is None or line["failed"] for lines in recorded for line in lines):
            fail(f"argument --check: {path} has not all runs of the stage check; run the study first")
        now = []
        for jobs, lines in zip(stages, recorded, strict=True):
            found = {job.folder: line for job, line in _results(runner, jobs, args, [*now, *results], fail)}
            again = [found[job.folder] for job in jobs]
            now += again
            wrong += _differences(jobs, lines, again)
    if wrong:
        fail(f"--check: not within what the recorded runs differ by: {', '.join(wrong)}")
    print("Every number lies within what the recorded runs differ by")


def _differences(jobs, recorded, again):
    """Print how two series of the same runs compare; those measures of them that differ by more than seeds do.

    By how much seeds differ is the smaller spread of the two series, so that a number that was altered in one does not
    vouch for itself.
    """
    wrong = []
    for measure in dict.fromkeys(name for line in (*recorded, *again) for name in line["measures"]):
        series = [[_mean(line, measure) for line in lines] for lines in (recorded, again)]
        known = [[value for value in values if value is not None] for values in series]
        spread = min(max(values, default=0) - min(values, default=0) for values in known)
        for job, was, found in zip(jobs, *series, strict=True):
            good = None not in (was, found) and abs(found - was) <= spread
            verdict = "yes" if good else "NO"
            print(f"{job.name}: {measure} {found}, recorded {was}, seeds differ by {spread:.3g}: {verdict}")
            wrong += [] if good else [f"{measure} of seed {job.seed}"]
    return wrong


def _mean(line, measure):
    """Of what is one number or one by layer; None if the line does not have it."""
    import numpy as np

    return float(np.mean(line["measures"][measure])) if measure in line["measures"] else None
