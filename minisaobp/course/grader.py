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
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
from nbformat.v4 import new_output

from . import student
from .submission import BEGIN_HIDDEN, is_manual, is_setup, is_solution, is_test

TEST = "<test>"
PRINTED = 20_000  # bytes of a cell's output that are kept


class Limits(NamedTuple):
    seconds: float = 20  # of a cell
    megabytes: int = 2048  # of address space of a student's process
    user: str | None = None  # that runs the student's code; needs root


class CannotGrade(Exception):
    """Nobody's fault but this machine's: no score may come of it."""


class StudentError(Exception):
    """What went wrong in the student's process."""

    def __init__(self, words, description=None):
        super().__init__(words)
        self.description = description or {}


class Student:
    """The process of one submission. Its cells run one after another; each test cell speaks with a copy of it."""

    def __init__(self, limits):
        self.limits = limits
        self.process = None
        self.ran = []  # sources of the cells that came to an end
        self.folder = tempfile.mkdtemp(prefix="submission")
        if limits.user:
            shutil.chown(self.folder, limits.user)
        _copy_font_cache(self.folder)

    def __enter__(self):
        self._start()
        return self

    def __exit__(self, *_):
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self):
        self.listener = socket.socket(socket.AF_UNIX)
        path = os.path.join(self.folder, f"socket{time.monotonic_ns()}")
        self.listener.bind(path)
        os.chmod(path, 0o666)  # the folder keeps others out
        self.listener.listen()
        self.listener.settimeout(60)
        self.printed = open(os.path.join(self.folder, "printed"), "w+b")  # noqa: SIM115  closed by _kill
        all_cells = int(100 * self.limits.seconds)
        environment = {name: self.folder for name in ("HOME", "IPYTHONDIR", "MPLCONFIGDIR", "TMPDIR")}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment |= {"PATH": os.defpath, "LANG": "C.UTF-8", "MPLBACKEND": "Agg"}
        environment |= {"PYTHONWARNINGS": "ignore:FigureCanvasAgg is non-interactive"}
        command = [sys.executable, "-I", student.__file__, path, all_cells, self.limits.megabytes]
        try:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.printed,
                stderr=self.printed,
                start_new_session=True,
                user=self.limits.user,
            )
            self.connection = self._accept()
        except (OSError, StudentError) as error:
            said = Path(self.printed.name).read_text(errors="replace").strip().splitlines()
            self._kill()
            raise CannotGrade(f"a student's process does not start: {said[-1] if said else error}") from None

    def _accept(self):
        deadline = time.monotonic() + 60
        self.listener.settimeout(0.2)
        while True:
            try:
                return self.listener.accept()[0]
            except TimeoutError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise StudentError("the process has ended") from None

    def _kill(self):
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with its copies, whose group is the same
            self.process.wait()
        self.listener.close()
        self.printed.close()

    def run(self, source):
        """Run a cell; its outputs in nbformat's form, the last one an error if it failed."""
        self.printed.seek(0, os.SEEK_END)
        start, error = self.printed.tell(), None
        try:
            reply = self._ask(source)
            error = reply["error"]
            pictures = [str(p) for p in reply["pictures"]]
            self.ran.append(source)
        except StudentError as trouble:
            error, pictures = {"kind": "StudentError", "message": str(trouble), "lines": []}, []
        self.printed.seek(start)
        text = self.printed.read(PRINTED).decode(errors="replace")
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        outputs += [new_output("display_data", {"image/png": picture}) for picture in pictures]
        if error:
            outputs.append(_error(str(error["kind"]), str(error["message"]), map(str, error["lines"])))
            self._again_if_dead()
        return outputs

    def _ask(self, source):
        connection = self.connection
        connection.settimeout(self.limits.seconds)
        try:
            student.send(connection, {"run": source})
            return student.receive(connection)
        except TimeoutError:
            pass
        except (EOFError, OSError, ValueError, TypeError, KeyError, AttributeError):
            self._kill()
            raise StudentError("the cell ended its own process (os._exit, or more memory than allowed)") from None
        late = StudentError(f"the cell took longer than {self.limits.seconds:g} seconds: an endless loop?")
        os.killpg(self.process.pid, signal.SIGINT)
        connection.settimeout(2)
        try:
            student.receive(connection)
        except Exception:  # it does not listen
            self._kill()
        raise late

    def _again_if_dead(self):
        """A new process in the state before the cell that ended the old one."""
        if self.process.poll() is None:
            return
        self._start()
        for source in self.ran:
            try:
                self._ask(source)
            except StudentError:
                return

    @contextlib.contextmanager
    def copy(self):
        """Ask(message) -> reply of a fresh copy of the process, for as long as a cell may take."""
        if self.process.poll() is not None:
            raise StudentError("the process has ended")
        student.send(self.connection, {"fork": True})
        connection = self._accept()
        deadline = time.monotonic() + self.limits.seconds

        def ask(message):
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                student.send(connection, message)
                reply = student.receive(connection)
            except TimeoutError:
                raise StudentError(
                    f"this took longer than {self.limits.seconds:g} seconds: is there a loop that never ends?"
                ) from None
            except (EOFError, OSError):
                raise StudentError("the call ended the whole process (os._exit, or more memory than allowed)") from None
            except (ValueError, TypeError, KeyError, AttributeError):
                raise StudentError("what came back is no answer") from None
            if not isinstance(reply, dict):
                raise StudentError("what came back is no answer")
            return reply

        with connection:
            yield ask


class StandIn:
    """A student's function, as a test sees it. Arrays that the function wrote into are written into here as well."""

    def __init__(self, name, ask):
        self.name, self.ask = name, ask

    def __call__(self, *arguments, **named):
        reply = self.ask({"call": self.name, "arguments": list(arguments), "named": named})
        if "error" in reply:
            error = {k: reply["error"].get(k) for k in ("kind", "message", "lines")}
            raise StudentError(f"{self.name} raised {error['kind']}: {error['message']}", error)
        for mine, theirs in zip(arguments, reply.get("arguments", ()), strict=False):
            if isinstance(mine, np.ndarray) and mine.shape == getattr(theirs, "shape", None):
                mine[...] = theirs
        return reply.get("result")


def execute(nb, names, limits):
    """Run every code cell of a notebook, its tests against the functions `names` of the student's, outputs and all."""
    namespace = {"__name__": "__tests__"}
    with Student(limits) as process:
        for number, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
            cell.execution_count = number
            if is_test(cell):
                cell.outputs = run_test(cell.source, dict(namespace), names, process)
                continue
            if is_setup(cell):
                try:
                    with contextlib.redirect_stdout(io.StringIO()):  # shown by the student's process
                        exec(compile(cell.source, "<setup>", "exec"), namespace)
                except Exception as error:
                    raise CannotGrade(f"the setup of the tests fails here: {type(error).__name__}: {error}") from None
            cell.outputs = process.run(cell.source)


def run_test(source, namespace, names, process):
    """Outputs of a test cell; the last one is an error if a test failed."""
    tree = ast.parse(source)
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    own = {n.id for n in used if isinstance(n.ctx, ast.Store)} | namespace.keys() | set(dir(builtins))
    wanted = {n.id for n in used} & names - own
    printed = io.StringIO()
    try:
        with process.copy() as ask:
            for name in sorted(wanted):
                reply = ask({"get": name})
                if "missing" in reply:
                    raise StudentError(f"{name} is not defined: did its cell fail?")
                if "error" in reply:
                    raise StudentError(f"{name} is neither a function nor numbers or text")
                namespace[name] = StandIn(name, ask) if "function" in reply else reply.get("value")
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, TEST, "exec"), namespace)
    except ImportError as error:
        raise CannotGrade(f"a test needs a package that is missing here: {error}") from None
    except Exception as error:
        return [_failure(error, source)]
    return [new_output("stream", name="stdout", text=printed.getvalue())] if printed.getvalue() else []


def _failure(error, source):
    """In words, why a test failed. Of a hidden test: what the test itself says, nothing that the student's code says."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TEST]
    before = source.splitlines()[: lines[-1]] if lines else []
    hidden = any(BEGIN_HIDDEN in line for line in before)
    words, own = str(error) or "a test failed", []
    if isinstance(error, StudentError) and error.description:
        own = [] if hidden else map(str, error.description["lines"] or [])
        if hidden:
            words = words.partition(":")[0]
    elif not isinstance(error, AssertionError | StudentError):  # a test that stumbled over what came back
        words = "the answer is not of the form asked for" + ("" if hidden else f" ({type(error).__name__}: {error})")
    return _error("Hidden test" if hidden else "Test", words, own)


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
