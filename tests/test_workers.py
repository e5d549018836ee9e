"""Jobs spread over processes: each once, each with its share, and what happens when one of them cannot."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from minisaobp.workers import Refused, spread


def start(*arguments):
    def work(job):
        if job == "refuse":
            raise Refused("this one is not done")
        if job == "fail":
            raise ZeroDivisionError("of a job")
        if job == "end":
            os._exit(3)
        if job == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if job == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if job == "import":  # what an interrupt becomes in an extension module's import
            try:
                print("begun", flush=True)
                time.sleep(60)
            except KeyboardInterrupt:
                raise ImportError("initialization failed") from None
        if job == "full":
            raise OSError(28, "No space left on device")
        if job == "long":
            os.write(1, b"begun\n")  # print may write the line and its end apart, and two processes say it
            time.sleep(60)
        time.sleep(0.05 * (job == "slow"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), cores, arguments

    return work


def test_every_job_once_and_each_process_its_share(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    jobs = ["slow", *range(6)]
    done = list(spread(jobs, 2, start, ("a", 1), ["5", "7"]))
    assert sorted(map(str, dict(done))) == sorted(map(str, jobs)) and len(done) == 7
    shares = {result for _, result in done}
    assert len({pid for pid, *_ in shares}) == 2 and os.getpid() not in {pid for pid, *_ in shares}
    assert {gpu for _, gpu, *_ in shares} == {"5", "7"} and {arguments for *_, arguments in shares} == {("a", 1)}
    if hasattr(os, "sched_getaffinity"):
        assert {cores for _, _, cores, _ in shares} == {max(1, len(os.sched_getaffinity(0)) // 2)}
        alone = [cores for _, (_, _, cores, _) in spread([1], 2, start, ())]
        assert alone == [len(os.sched_getaffinity(0))]  # nobody to share with
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert list(spread([], 3, start, ())) == []


@pytest.mark.parametrize(
    ("job", "kind", "message"),
    [
        ("refuse", Refused, "^this one is not done$"),
        ("fail", RuntimeError, "a process failed at fail:(.|\n)*ZeroDivisionError: of a job"),
        ("end", Refused, "^a process ended while it was at end, with exit code 3$"),
        ("kill", Refused, "at kill, with exit code -9: it was killed, maybe for want of memory$"),
        ("full", Refused, "^full: .*No space left on device$"),
        ("interrupt", Refused, "^a process was interrupted while it was at interrupt$"),
    ],
)
def test_what_cannot_be_done_is_said_and_what_is_done_is_kept(job, kind, message):
    done = {}
    with pytest.raises(kind) as raised:
        for one, result in spread([1, job, 2, 3], 1, start, ()):
            done[one] = result
    assert re.search(message, str(raised.value)) and list(done) == [1]


def test_ctrl_c_while_a_process_is_still_starting(monkeypatch, capfd):
    kind = multiprocessing.get_context("spawn").Process
    real = kind.start

    def start_and_press(process):
        real(process)
        os.kill(process.pid, signal.SIGINT)  # as a terminal does, to all
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(kind, "start", start_and_press)
    with pytest.raises(KeyboardInterrupt):
        list(spread(["long"], 1, start, ()))
    out, errors = capfd.readouterr()
    assert "begun" not in out and "Traceback" not in errors


def test_ctrl_c_that_a_job_turns_into_another_error():
    code = "from tests.test_workers import *; list(spread(['import'], 1, start, ()))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "begun\n"
        parent.send_signal(signal.SIGINT)
        errors = parent.stderr.read()
    assert "KeyboardInterrupt" in errors and "ImportError" not in errors


LOOK = """
from tests.test_workers import *
kind = multiprocessing.get_context("spawn").Process
real = kind.start

def start_and_look(process):
    real(process)
    with open(f"/proc/{process.pid}/status") as file:
        blocked = next(line for line in file if line.startswith("SigBlk"))
    print(int(blocked.split()[1], 16) >> signal.SIGINT - 1 & 1)

kind.start = start_and_look
list(spread([1, 2], 2, start, ()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells there which signals are blocked")
def test_no_process_starts_with_ctrl_c_let_through():
    done = subprocess.run([sys.executable, "-c", LOOK], stdout=subprocess.PIPE, text=True)  # where none was before
    assert done.stdout == "1\n1\n"


def test_processes_end_with_a_parent_that_is_killed():
    code = "from tests.test_workers import *; list(spread(['long', 'long'], 2, start, ()))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
        parent.kill()
        started = time.monotonic()
        parent.stdout.read()  # until nobody can write into it any more
    assert time.monotonic() - started < 30  # of the 60 that the jobs take
