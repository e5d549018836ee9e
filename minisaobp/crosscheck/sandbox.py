"""Where a stranger's function runs: in a thread of this process, or in a process of its own that can be ended.

Both have `ask(case, limit, gradients)`, which gives what `arrays.call` gives and raises TimeLimit or Died, and
`close()`. `exchange.Answers` is a third, of a program that has answered in files.
"""

import contextlib
import ctypes
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from safetensors.numpy import load as read_tensors
from safetensors.numpy import save as tensor_bytes

from .arrays import LIBRARIES, call, takes_valid

STARTING = 120.0  # seconds that an import may take; PyTorch and JAX take up to ten
ENDING = 1.0  # seconds from the end of a process's answers to its own


class TimeLimit(Exception):
    """The function did not return within the limit."""


class Died(Exception):
    """The function's process ended, or its thread was ended by it; says how."""


class CannotStart(ValueError):
    """There is no such function, or no such array library; says why."""


NO_VALID = "the function has no argument named valid"


class InThread:
    """The function as it is, in a thread, so that closures, notebooks and GPUs work as they do elsewhere.

    A loop in Python that does not return is ended. Compiled code that does not return cannot be, and goes on behind:
    nothing is asked after that (`stuck`). Code that also holds the interpreter's lock stops this process too.
    """

    without_padding = NO_VALID

    def __init__(self, fn, arrays="numpy", one_matrix=False):
        if not callable(fn):
            raise TypeError(f"fn: expected a function, got {type(fn).__name__}")
        self.arrays = library(arrays)
        self.fn, self.one_matrix, self.stuck = fn, one_matrix, False
        self.takes_valid = takes_valid(fn)

    def ask(self, case, limit, gradients=False):
        question = case.question(gradients)
        if self.stuck:
            raise Died("a call before this one still runs")
        answers = []

        def work():
            with contextlib.suppress(SystemExit):  # the function's, or the one below that ends it
                answers.append(call(self.fn, self.arrays, **question, one_matrix=self.one_matrix))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(limit)
        if thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
            thread.join(1.0)
            self.stuck = thread.is_alive()
            raise TimeLimit
        if not answers:
            raise Died("the function ended its thread (SystemExit)")
        return answers[0]

    def close(self):
        pass


class InProcess:
    """`package.module:function` imported and called in a process of its own: it can crash, exit or never return."""

    without_padding = NO_VALID

    def __init__(self, where, arrays="numpy", one_matrix=False):
        start = "import sys; sys.path.append(sys.argv.pop(1)); from minisaobp.crosscheck.sandbox import main; main()"
        package = str(Path(__file__).parents[2])
        self.command = [sys.executable, "-c", start, package, where, arrays, str(int(one_matrix))]
        self.process = None
        self.takes_valid = self._start()["takes_valid"]

    def ask(self, case, limit, gradients=False):
        if self.process is None:
            self._start()
        tensors = {name: np.asarray(x) for name, x in case.question(gradients).items() if x is not None}
        with contextlib.suppress(OSError):  # it has ended: there is no answer either
            self.process.stdin.write(_message(tensors, {}))
            self.process.stdin.flush()
        tensors, told = self._answer(limit)
        return tensors | told

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    stream.close()
            self.process = None

    def _start(self):
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.messages = queue.Queue()
        threading.Thread(target=_read_into, args=(self.process.stdout, self.messages), daemon=True).start()
        try:
            _, told = self._answer(STARTING)
        except (TimeLimit, Died) as trouble:
            raise CannotStart(f"its import {'does not end' if isinstance(trouble, TimeLimit) else trouble}") from None
        if "trouble" in told:
            self.close()
            raise CannotStart(told["trouble"])
        return told

    def _answer(self, limit):
        try:
            found = self.messages.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise TimeLimit from None
        if found is None:
            try:
                code = self.process.wait(timeout=ENDING)
            except subprocess.TimeoutExpired:
                self.close()
                raise Died("closed the files of its process and went on") from None
            self.close()
            raise Died(f"ended its process (signal {-code})" if code < 0 else f"ended its process (exit code {code})")
        return found


def library(name):
    """The arrays of a library that is here. Raises CannotStart."""
    try:
        return LIBRARIES[name]()
    except ImportError as error:
        raise CannotStart(f"arrays: {name} cannot be imported ({error})") from None
    except ValueError as error:  # no GPU
        raise CannotStart(f"arrays: {error}") from None


def function_at(where):
    """The function `package.module:name`, the current folder first on the path. Raises CannotStart."""
    module, _, name = where.partition(":")
    if not module or not name:
        raise CannotStart(f"expected package.module:function, got {where!r}")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = "" if error.name and module.startswith(error.name) else f", which {module} imports"
        raise CannotStart(f"no module named {error.name!r}{missing}") from None
    except Exception as error:
        raise CannotStart(f"{module} cannot be imported ({type(error).__name__}: {error})") from None
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise CannotStart(f"{module} has no {name!r}") from None
        except Exception as error:  # a module may have its own __getattr__
            raise CannotStart(f"{module} does not give {name!r} ({type(error).__name__}: {error})") from None
    if not callable(found):
        raise CannotStart(f"{where} is not a function but {type(found).__name__}")
    return found


# ---- what goes through the pipe: a length of 8 bytes, then safetensors with one line of JSON as its metadata --------


def _message(tensors, told):
    tensors = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in tensors.items()}
    data = tensor_bytes(tensors, metadata={"told": json.dumps(told)})
    return len(data).to_bytes(8, "little") + data


def _read(stream):
    """The next message as (tensors, told), None at the end."""
    length = stream.read(8)
    if len(length) < 8:
        return None
    data = stream.read(int.from_bytes(length, "little"))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return read_tensors(data), json.loads(header["__metadata__"]["told"])


def _read_into(stream, messages):
    with contextlib.suppress(Exception):  # closed, or the function wrote into it
        while (found := _read(stream)) is not None:
            messages.put(found)
    messages.put(None)


def serve(where, arrays, one_matrix):
    """The process's life: one message about the function, then an answer to every question."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the function prints goes to stderr

    def say(tensors, told):
        answers.write(_message(tensors, told))
        answers.flush()

    try:
        fn = function_at(where)
        arrays = library(arrays)
    except CannotStart as error:
        return say({}, {"trouble": str(error)})
    say({}, {"takes_valid": takes_valid(fn)})
    while (found := _read(questions)) is not None:
        given = found[0]
        lam = given.get("lam")
        question = {"A": given["A"], "valid": given.get("valid"), "dB": given.get("dB")}
        answer = call(fn, arrays, lam=float(lam) if np.ndim(lam) == 0 and lam is not None else lam, **question,
                      one_matrix=one_matrix)  # fmt: skip
        tensors = {name: x for name, x in answer.items() if isinstance(x, np.ndarray)}
        told = {name: x for name, x in answer.items() if not isinstance(x, np.ndarray)}
        for name in [name for name, x in tensors.items() if x.dtype.name not in SENT]:
            told["type"] = f"an array of {tensors.pop(name).dtype}"
        say(tensors, told)


SENT = (
    "float16",
    "float32",
    "float64",
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the judge, which ends this process
    serve(sys.argv[1], sys.argv[2], sys.argv[3] == "1")
