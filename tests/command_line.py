"""The command line as tests call it."""

import contextlib
import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

from minisaobp import cli


class CUDARuntimeError(RuntimeError):
    """As CuPy's own, where there is none."""

    __module__ = "cupy_backends.cuda.api.runtime"


def run(*arguments):
    """The command line in this process, which saves a second each time."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with (
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        patch.dict(os.environ),  # --precision writes to it
    ):
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def run_alone(*arguments):
    """The command line in a process of its own, as a person has it."""
    command = [sys.executable, "-m", "minisaobp", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(folder, arguments, message):
    """Called in a folder it ends with one line and exit code 2, and leaves the folder as it was."""
    here, before = os.getcwd(), sorted(os.listdir(folder))
    os.chdir(folder)
    try:
        done = run(*arguments)
    finally:
        os.chdir(here)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert sorted(os.listdir(folder)) == before
