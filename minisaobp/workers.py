"""Independent jobs spread over processes, each with its own share of the GPUs and of the processor's cores."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from multiprocessing import resource_tracker
from multiprocessing.connection import wait


class Refused(Exception):
    """A job that cannot be done as it was asked for, or here and now; one line says why."""


def spread(jobs, count, start, arguments, gpus=()):
    """Do the jobs in `count` processes; yields (job, result) as they come.

    start(*arguments) is called once in every process and returns the function job -> result. gpus: names, as in
    CUDA_VISIBLE_DEVICES, of the GPUs that the processes share, of which each sees one. After Ctrl-C no job is begun,
    those under way are interrupted, once, and when all have ended KeyboardInterrupt is raised; a second Ctrl-C does not
    wait. Raises Refused if a job does, or if a process is ended from outside; RuntimeError if a process fails. If this
    process is killed, the others end too.
    """
    context = multiprocessing.get_context("spawn")  # a forked process must not use the GPU
    waiting, busy, processes, pressed = list(jobs)[::-1], {}, {}, []  # busy, processes: by connection

    def press(number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGINT)

    def give(connection):
        if waiting and not pressed:
            busy[connection] = waiting.pop()
            with contextlib.suppress(OSError):  # a process that is gone is noticed where its answer is waited for
                connection.send(busy[connection])

    count = min(count, len(waiting))
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # which lets Ctrl-C through when it starts, inside `_later` too
    before = signal.signal(signal.SIGINT, press)
    try:
        for n in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, start, arguments), daemon=True)
            with _share(n, count, gpus), _later():
                process.start()
            theirs.close()
            processes[ours] = process
            give(ours)
        while busy:
            for connection in wait(list(busy)):
                job = busy.pop(connection)
                try:
                    said, result = connection.recv()
                except (EOFError, ConnectionResetError):
                    if pressed:
                        continue
                    process = processes[connection]
                    process.join()
                    ended = f"a process ended while it was at {job}, with exit code {process.exitcode}"
                    killed = process.exitcode == -9
                    raise Refused(ended + ": it was killed, maybe for want of memory" * killed) from None
                if said == "refused":
                    raise Refused(result)
                if said == "failed":
                    raise RuntimeError(f"a process failed at {job}:\n{result}")
                if said == "done":
                    yield job, result
                    give(connection)
                elif not pressed:  # somebody else's signal, to that process alone
                    raise Refused(f"a process was interrupted while it was at {job}")
        for connection, process in processes.items():
            connection.close()  # which ends it
            process.join()
        if pressed:
            raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
        for process in processes.values():
            process.kill()
            process.join()


def _serve(connection, start, arguments):
    """A process: jobs come in, results go out."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C is the parent's, who passes it on
    busy = stopped = False

    def press(number, frame):
        nonlocal stopped
        stopped = True
        if busy:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked by `_later`
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = None
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            busy = True
            if stopped:
                raise KeyboardInterrupt
            work = work or start(*arguments)
            answer = "done", work(job)
            busy = False
        except KeyboardInterrupt:  # also of a job that has its own way with Ctrl-C
            answer = "stopped", None
        except Refused as refusal:
            answer = "refused", str(refusal)
        except (MemoryError, OSError) as error:  # too little memory, a full disk: the machine's fault
            answer = "refused", f"{job}: {error}"
        except BaseException:
            answer = "failed", traceback.format_exc()
        if stopped and answer[0] != "done":  # whatever the interrupt became on its way: in an import, an ImportError
            answer = "stopped", None
        busy = False
        connection.send(answer)


def _end_with_parent():
    """A process whose parent was killed must not go on: the next one would be at the same job."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _later():
    """Ctrl-C comes after what is done inside, and in a process started inside when that is ready for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _share(n, count, gpus):
    """What a process that is started inside inherits: one of the GPUs, its part of the cores."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[n % len(gpus)]
    if cores:
        os.sched_setaffinity(0, cores[n % len(cores) :: count] if count < len(cores) else [cores[n % len(cores)]])
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
