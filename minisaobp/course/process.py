"""The process of one submission, as the grader holds it. What runs in it is `student`; nothing it says is trusted."""

import base64
import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from nbformat.v4 import new_output

from . import student

PRINTED = 20_000  # bytes of a cell's output that are kept
PICTURE = 2**22  # bytes of one
CELLS = 15  # the student's own cells together may take as long as so many
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
        self.lines = lines


class Student:
    """The process of one submission: its cells run one after another, and `copy` keeps its state for a test cell."""

    def __init__(self, limits):
        self.limits = limits
        self.started = []  # processes; the last one is that of now
        self.copies = []
        self.ran = []  # sources of the cells that came to an end
        self.left = CELLS * limits.seconds  # for all that is not a test

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="submission")
        self.printed = open(os.path.join(self.folder, "printed"), "w+b", buffering=0)
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
                **_account(self.limits.user),
            )
            self.started.append(process)
            self.connection = self._accept(START_SECONDS)
        except (OSError, StudentError) as error:
            self.printed.seek(0)
            said = self.printed.read(PRINTED).decode(errors="replace").strip().splitlines()
            raise CannotGrade(f"a student's process does not start: {said[-1] if said else error}") from None

    def _accept(self, seconds):
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.listener.accept()[0]
            except TimeoutError:
                if self.started[-1].poll() is not None or time.monotonic() > deadline:
                    raise StudentError("the process has ended") from None

    def run(self, source):
        """Run a cell; its outputs in nbformat's form, the last one an error if it failed."""
        self.printed.seek(0)  # of the student's process as well, which writes to the same open file
        self.printed.truncate()
        try:
            error, pictures = self._ask(source)
            self.ran.append(source)
        except StudentError as trouble:
            error, pictures = {"kind": "StudentError", "message": str(trouble), "lines": []}, []
            if self.started[-1].poll() is not None:
                self._again()
        self.printed.seek(0)
        text = self.printed.read(PRINTED).decode(errors="replace")
        outputs = [new_output("stream", name="stdout", text=text)] if text else []
        outputs += [new_output("display_data", {"image/png": picture}) for picture in pictures if _is_png(picture)]
        if error:
            outputs.append(error_output(*(error[key] for key in ("kind", "message", "lines"))))
        return outputs

    def _ask(self, source):
        connection, process, start = self.connection, self.started[-1], time.monotonic()
        seconds = min(self.limits.seconds, self.left)
        if seconds <= 0:
            raise StudentError(f"not run: the cells before took {CELLS * self.limits.seconds:g} seconds together")
        connection.settimeout(seconds)
        try:
            student.send(connection, {"run": source})
            reply = student.receive(connection, start + seconds)
            error = reply["error"] and {k: reply["error"][k] for k in ("kind", "message", "lines")}
            return error, list(reply["pictures"])
        except TimeoutError:
            late = StudentError(f"the cell took longer than {seconds:.3g} seconds: an endless loop?")
        except Exception:  # it has ended, or says what is no answer
            process.kill()
            process.wait()
            raise StudentError("the cell ended its own process (os._exit, or more memory than allowed)") from None
        finally:
            self.left -= time.monotonic() - start
        process.send_signal(signal.SIGINT)
        try:
            student.receive(connection, time.monotonic() + 2)
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

    def copy(self, of=None):
        """A Copy of the process as it is now, or of a copy."""
        connection, start = of.connection if of else self.connection, time.monotonic()
        try:
            connection.settimeout(self.limits.seconds)
            student.send(connection, {"fork": True})
            made = Copy(self._accept(min(self.limits.seconds, max(self.left, 1))), self)
        except (OSError, StudentError, AttributeError):
            made = Copy(None, self)
            self.left -= time.monotonic() - start
        self.copies.append(made)
        return made


class Copy:
    """A copy of a student's process that waits to be asked by a test cell."""

    def __init__(self, connection, owner):
        self.connection, self.owner, self.deadline = connection, owner, None

    def close(self):
        """End it; it may be in a loop, and would slow down the tests to come."""
        if self.connection is None:
            return
        if hasattr(socket, "SO_PEERCRED"):
            pid, *_ = struct.unpack("3i", self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(pid) in {process.pid for process in self.owner.started} - {pid}:
                    os.kill(pid, signal.SIGKILL)
        self.connection.close()
        self.connection = None

    def ask(self, message):
        """Its reply, a dict. All questions together may take as long as a cell."""
        if self.connection is None:
            raise StudentError("the process has ended")
        seconds = self.owner.limits.seconds
        self.deadline = self.deadline or time.monotonic() + seconds
        self.connection.settimeout(max(self.deadline - time.monotonic(), 1e-3))
        try:
            student.send(self.connection, message)
            reply = student.receive(self.connection, self.deadline)
            return {str(k): v for k, v in reply.items()}
        except TimeoutError:
            raise StudentError(f"this took longer than {seconds:g} seconds: is there a loop that never ends?") from None
        except (EOFError, OSError):
            raise StudentError("the call ended the whole process (os._exit, or more memory than allowed)") from None
        except Exception:
            raise StudentError("what came back is no answer") from None


def error_output(kind, words, lines=()):
    """An error as an output. All of it may be of the student's making, also text that no file can hold."""
    kind, words = _text(kind)[:100], _text(words)[:2000]
    lines = [_text(line)[:500] for line in (lines if isinstance(lines, (list, tuple)) else [])][:20]
    return new_output("error", ename=kind, evalue=words, traceback=[f"{kind}: {words}", *lines])


def _text(value):
    return str(value).encode(errors="replace").decode()


def _is_png(picture):
    """Whether it is what the student's process should send, and not a piece of a page."""
    try:
        return base64.b64decode(picture, validate=True).startswith(b"\x89PNG\r\n") and len(picture) <= PICTURE
    except (TypeError, ValueError):
        return False


def _account(user):
    """subprocess.Popen's words for somebody else's account, without the groups of one's own."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def _copy_font_cache(folder):
    """matplotlib's list of fonts, which takes seconds to make."""
    with contextlib.suppress(ImportError):
        import matplotlib

        for file in glob.glob(os.path.join(glob.escape(matplotlib.get_cachedir()), "fontlist*.json")):
            shutil.copy(file, folder)
