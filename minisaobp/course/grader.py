"""Runs a submission and its tests, each in a process of its own (`student` is the other one).

The tests are executed here, cell by cell. Where a test names a function of the student's, it gets a stand-in: a call is
carried to the student's process with copies of the arguments, and what comes back is numbers, arrays and text.
"""

import ast
import builtins
import contextlib
import glob
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from typing import NamedTuple

import nbformat
import numpy as np
from nbformat.v4 import new_output

from . import student
from .submission import BEGIN_HIDDEN, is_manual, is_setup, is_solution, is_test

TEST = "<test>"
PRINTED = 20_000  # bytes of a cell's output that are kept
START_SECONDS = 60  # a process may take to start


class Limits(NamedTuple):
    seconds: float = 20  # of a cell
    megabytes: int = 2048  # of address space of a student's process
    user: str | None = None  # that runs the student's code; needs root


class CannotGrade(Exception):
    """Nobody's fault but this machine's: no score may come of it."""


class StudentError(Exception):
    """What went wrong in the student's process."""

    def __init__(self, words, lines=()):
        super().__init__(words)
        self.lines = [str(line) for line in lines]


class Student:
    """The process of one submission: its cells run one after another, and `copy` keeps its state for a test cell."""

    def __init__(self, limits):
        self.limits = limits
        self.started = []  # processes; the last one is that of now
        self.copies = []
        self.ran = []  # sources of the cells that came to an end

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="submission")
        self.printed = open(os.path.join(self.folder, "printed"), "w+b")
        self.listener = socket.socket(socket.AF_UNIX)
        self.path = os.path.join(self.folder, "socket")
        self.listener.bind(self.path)
        self.listener.listen()
        self.listener.settimeout(0.2)
        if self.limits.user:
            for path in (self.folder, self.path):
                shutil.chown(path, self.limits.user)
        _copy_font_cache(self.folder)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self.started:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
        for file in (*self.copies, self.listener, self.printed, getattr(self, "connection", self.printed)):
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self):
        environment = dict.fromkeys(("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "TMPDIR"), self.folder)
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PATH": os.defpath, "LANG": "C.UTF-8", "MPLBACKEND": "Agg"}
        environment |= {"PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive"}
        all_cells = int(100 * self.limits.seconds)  # processor time, should all else fail
        command = [sys.executable, "-I", student.__file__, self.path, all_cells, self.limits.megabytes]
        try:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.printed,
                stderr=self.printed,
                start_new_session=True,
                user=self.limits.user,
            )
            self.started.append(process)
            self.connection = self._accept()
        except (OSError, StudentError) as error:
            self.printed.seek(0)
            said = self.printed.read(PRINTED).decode(errors="replace").strip().splitlines()
            raise CannotGrade(f"a student's process does not start: {said[-1] if said else error}") from None

    def _accept(self):
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.listener.accept()[0]
            except TimeoutError:
                if self.started[-1].poll() is not None or time.monotonic() > deadline:
                    raise StudentError("the process has ended") from None

    def run(self, source):
        """Run a cell; its outputs in nbformat's form, the last one an error if it failed."""
        start = self.printed.seek(0, os.SEEK_END)
        try:
            error, pictures = self._ask(source)
            self.ran.append(source)
        except StudentError as trouble:
            error, pictures = {"kind": "StudentError", "message": str(trouble), "lines": []}, []
            if self.started[-1].poll() is not None:
                self._again()
        self.printed.seek(start)
        text = self.printed.read(PRINTED).decode(errors="replace")
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        outputs += [new_output("display_data", {"image/png": picture}) for picture in pictures]
        if error:
            outputs.append(_error(str(error["kind"]), str(error["message"]), map(str, error["lines"])))
        return outputs

    def _ask(self, source):
        connection, process = self.connection, self.started[-1]
        connection.settimeout(self.limits.seconds)
        try:
            student.send(connection, {"run": source})
            reply = student.receive(connection)
            error = reply["error"] and {k: reply["error"][k] for k in ("kind", "message", "lines")}
            return error, [str(picture) for picture in reply["pictures"]]
        except TimeoutError:
            late = StudentError(f"the cell took longer than {self.limits.seconds:g} seconds: an endless loop?")
        except (EOFError, OSError, ValueError, TypeError, KeyError, AttributeError):
            process.kill()
            process.wait()
            raise StudentError("the cell ended its own process (os._exit, or more memory than allowed)") from None
        process.send_signal(signal.SIGINT)
        connection.settimeout(2)
        try:
            student.receive(connection)
        except Exception:  # it does not listen
            process.kill()
            process.wait()
        raise late

    def _again(self):
        """A new process in the state before the cell that ended the old one."""
        self.connection.close()
        self._start()
        with contextlib.suppress(StudentError):
            for source in self.ran:
                self._ask(source)

    def copy(self):
        """A Copy of the process as it is now."""
        try:
            student.send(self.connection, {"fork": True})
            made = Copy(self._accept(), self.limits.seconds)
        except (OSError, StudentError):
            made = Copy(None, self.limits.seconds)
        self.copies.append(made)
        return made


class Copy:
    """A copy of a student's process that waits to be asked by a test cell."""

    def __init__(self, connection, seconds):
        self.connection, self.seconds, self.deadline = connection, seconds, None

    def close(self):
        if self.connection:
            self.connection.close()

    def ask(self, message):
        """Its reply, a dict. All questions together may take as long as a cell."""
        if self.connection is None:
            raise StudentError("the process has ended")
        self.deadline = self.deadline or time.monotonic() + self.seconds
        self.connection.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        try:
            student.send(self.connection, message)
            reply = student.receive(self.connection)
            return {str(k): v for k, v in reply.items()}
        except TimeoutError:
            raise StudentError(
                f"this took longer than {self.seconds:g} seconds: is there a loop that never ends?"
            ) from None
        except (EOFError, OSError):
            raise StudentError("the call ended the whole process (os._exit, or more memory than allowed)") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StudentError("what came back is no answer") from None


class StandIn:
    """A student's function, as a test sees it. Arrays that the function wrote into are written into here as well."""

    def __init__(self, name, ask):
        self.name, self.ask = name, ask

    def __call__(self, *arguments, **named):
        reply = self.ask({"call": self.name, "arguments": list(arguments), "named": named})
        if "error" in reply:
            try:
                kind, message, lines = (reply["error"][k] for k in ("kind", "message", "lines"))
            except (TypeError, KeyError):
                raise StudentError("what came back is no answer") from None
            if kind == "NotImplementedError":
                raise StudentError(f"{self.name} is not written yet")
            raise StudentError(f"{self.name} raised {_known(kind)}: {message}", lines)
        for mine, theirs in zip(arguments, reply.get("changed") or (), strict=False):
            if isinstance(mine, np.ndarray) and mine.shape == getattr(theirs, "shape", None):
                mine[...] = theirs
        return reply.get("result")


def execute(nb, names, limits):
    """Run every code cell of a notebook, its tests against the functions `names` of the student's, outputs and all.

    The tests run when all other cells are done, each on a copy of the state that the notebook was in at its place: so
    no cell can show what a function was given by a hidden test.
    """
    setup, tests = [], []  # code of the cells that tests build on; what to do at last
    with Student(limits) as process:
        for number, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
            cell.execution_count = number
            if is_test(cell):
                tests.append((cell, setup[:], process.copy()))
                continue
            if is_setup(cell):
                setup.append(compile(cell.source, "<setup>", "exec"))
            cell.outputs = process.run(cell.source)
        for cell, before, copy in tests:
            cell.outputs = run_test(cell.source, _namespace(before), names, copy)
            copy.close()


def _namespace(setup):
    """What a test cell sees: made anew each time, since a student's function may have written into the last one."""
    namespace = {"__name__": "__tests__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the student's process shows it
            for code in setup:
                exec(code, namespace)
    except Exception as error:
        raise CannotGrade(f"the setup of the tests fails here: {type(error).__name__}: {error}") from None
    return namespace


def run_test(source, namespace, names, copy):
    """Outputs of a test cell; the last one is an error if a test failed."""
    tree = ast.parse(source)
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    own = {n.id for n in used if isinstance(n.ctx, ast.Store)} | namespace.keys() | set(dir(builtins))
    wanted = {n.id for n in used} & names - own
    printed = io.StringIO()
    try:
        for name in sorted(wanted):
            reply = copy.ask({"get": name})
            if "missing" in reply:
                raise StudentError(f"{name} is not defined: did its cell fail?")
            if "error" in reply:
                raise StudentError(f"{name} is neither a function nor numbers or text")
            namespace[name] = StandIn(name, copy.ask) if "function" in reply else reply.get("value")
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(tree, TEST, "exec"), namespace)
    except ImportError as error:
        raise CannotGrade(f"a test needs a package that is missing here: {error}") from None
    except Exception as error:
        return [_failure(error, source)]
    return [new_output("stream", name="stdout", text=printed.getvalue())] if printed.getvalue() else []


def _failure(error, source):
    """In words, why a test failed. Of a hidden test only what stands before a colon: the rest may tell its numbers."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TEST]
    before = source.splitlines()[: lines[-1]] if lines else []
    hidden = any(BEGIN_HIDDEN in line for line in before)
    words = str(error) or "a test failed"
    if not isinstance(error, (AssertionError, StudentError)):  # a test that stumbled over what came back
        words = f"the answer is not of the form asked for: {type(error).__name__}, {error}"
    if hidden:
        return _error("Hidden test", words.partition(":")[0])
    return _error("Test", words, getattr(error, "lines", ()))


def _known(kind):
    """The name of an exception, if it is one of Python's; others are the student's, and could say anything."""
    known = isinstance(kind, str) and isinstance(getattr(builtins, kind, None), type)
    return kind if known else "an exception of its own"


def _error(kind, words, lines=()):
    return new_output("error", ename=kind, evalue=words, traceback=[f"{kind}: {words}", *lines])


def defined_names(nb):
    """The names that the answer cells of a notebook define: what the tests may ask a student's process for."""
    names = set()
    for cell in nb.cells:
        if cell.cell_type == "code" and is_solution(cell):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef):
                    names.add(node.name)
                names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
                          and isinstance(node, ast.Assign)}  # fmt: skip
    return names


def scores(nb):
    """{grade_id: (score, points)} of an executed notebook; score is None where a person has to judge."""
    found = {}
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        if is_manual(cell):
            found[about["grade_id"]] = (None, about["points"])
        elif is_test(cell):
            failed = any(output.output_type == "error" for output in cell.outputs)
            found[about["grade_id"]] = (0 if failed else about["points"], about["points"])
    return found


def _copy_font_cache(folder):
    """matplotlib's list of fonts, which takes seconds to make."""
    with contextlib.suppress(ImportError):
        import matplotlib

        for file in glob.glob(os.path.join(glob.escape(matplotlib.get_cachedir()), "fontlist*.json")):
            shutil.copy(file, folder)


def read(path):
    return nbformat.read(path, as_version=4)
