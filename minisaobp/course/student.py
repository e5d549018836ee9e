"""The process that a student's code runs in. It knows no test, and what it sends is not trusted.

Started by `grader.Student` as a program, isolated from this package: python -I student.py SOCKET SECONDS MEGABYTES.
It connects to the socket and answers, one message after another:

    {"run": source}     runs a cell                          -> {"error": ..., "pictures": [...]}
    {"fork": true}      makes a copy of the process, which connects on its own and serves one test cell:
    {"get": name}       what the name stands for             -> {"function": true}, {"value": ...} or {"missing": true}
    {"call": name, "arguments": [...], "named": {...}}       -> {"result": ..., "changed": [...]}

The copy is thrown away after the test cell: no test can tell a later cell anything, and one that never ends, or ends
the process, takes nothing with it. A message is JSON behind its length, arrays as their bytes; nothing is pickled.
"""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import sys
import traceback

LARGEST = 2**26  # bytes of a message
KINDS = "biufc"  # NumPy's kinds of numbers


def send(connection, value):
    data = json.dumps(encode(value)).encode()
    if len(data) > LARGEST:
        raise ValueError(f"{len(data) / 2**20:.0f} MB are too much to hand over")
    connection.sendall(struct.pack(">Q", len(data)) + data)


def receive(connection):
    """The next message; EOFError when there is none, ValueError when it is none of ours."""
    (length,) = struct.unpack(">Q", _exactly(connection, 8))
    if length > LARGEST:
        raise ValueError("a message too long")
    return decode(json.loads(_exactly(connection, length)))


def _exactly(connection, length):
    parts = []
    while length:
        part = connection.recv(min(length, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def encode(value):
    """Numbers, text, arrays, and lists, tuples and dicts of them, as what JSON has. TypeError for anything else."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(v) for v in value]}
    if type(value) is dict:
        return {"dict": [[encode(k), encode(v)] for k, v in value.items()]}
    if type(value).__module__.partition(".")[0] == "numpy":
        import numpy as np

        array = np.asarray(value)
        if array.dtype.kind in KINDS and type(value) is not np.matrix:
            data = base64.b64encode(array.tobytes()).decode()
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return {kind: [array.dtype.str, list(array.shape), data]}
    raise TypeError(f"expected numbers, arrays or text, got {type(value).__name__}")


def decode(value):
    """What `encode` was given; ValueError, KeyError or TypeError if it cannot have been given anything."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(decode(v) for v in content)
    if kind == "dict":
        return {decode(k): decode(v) for k, v in content}
    import numpy as np

    dtype, shape, data = content
    if np.dtype(dtype).kind not in KINDS:
        raise ValueError(f"an array of {dtype}")
    array = np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    return array if kind == "array" else array[()]


def limit(seconds, megabytes):
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**26, 2**26))  # bytes of a file that it writes
    resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, megabytes * 2**20))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def make_shell():
    """IPython without a terminal, so that a cell may use magics, as in Jupyter."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.history_manager.enabled = False
    shell.enable_gui = lambda gui=None: None
    shell.register_magic_function(lambda line: None, magic_name="matplotlib")
    shell._showtraceback = lambda kind, error, lines: None  # told below, not printed
    return shell


def run(shell, source):
    result = shell.run_cell(source, store_history=False)
    error = result.error_before_exec or result.error_in_exec
    sys.stdout.flush()
    sys.stderr.flush()
    return {"error": describe(error) if error else None, "pictures": pictures()}


def describe(error):
    """Kind, message and the student's own lines of an exception."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ipython-input" in f.filename]
    lines = [f"line {f.lineno}, in {f.name}:  {f.line or ''}".rstrip() for f in frames[-8:]]
    try:
        message = str(error)[:2000]
    except BaseException:  # the student's own exception, and its own str
        message = ""
    return {"kind": type(error).__name__, "message": message, "lines": lines}


def pictures():
    """The open figures as PNG, closed afterwards."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums()[:20]:
        file = io.BytesIO()
        with contextlib.suppress(Exception):
            plt.figure(number).savefig(file, format="png")
            found.append(base64.b64encode(file.getvalue()).decode())
    plt.close("all")
    return found


def serve(connection, names):
    """Answer one test cell's questions until it hangs up."""
    while True:
        request = receive(connection)
        if "get" in request:
            name = request["get"]
            if name not in names:
                reply = {"missing": True}
            elif callable(names[name]):
                reply = {"function": True}
            else:
                reply = answer(lambda name=name: {"value": names[name]})
        else:
            reply = answer(lambda request=request: call(names[request["call"]], request))
        try:
            send(connection, reply)
        except (TypeError, ValueError, RecursionError) as error:
            send(connection, {"error": {"kind": "TypeError", "message": f"it returned what is no answer: {error}",
                "lines": []}})  # fmt: skip


def call(function, request):
    arguments = request["arguments"]
    before = [encode(a) for a in arguments]
    result = function(*arguments, **request["named"])
    changed = [a if encode(a) != b else None for a, b in zip(arguments, before, strict=True)]
    return {"result": result, "changed": changed}


def answer(question):
    try:
        return question()
    except BaseException as error:  # sys.exit as well
        return {"error": describe(error)}


def main(path, seconds, megabytes):
    sys.modules["minisaobp"] = None  # the answers are in it
    shell = make_shell()
    limit(int(seconds), int(megabytes))
    connection = connect(path)
    while True:
        try:
            request = receive(connection)
        except EOFError:
            return
        if "run" in request:
            send(connection, run(shell, request["run"]))
        elif os.fork() == 0:
            connection.close()
            with open(os.devnull, "w") as nowhere:  # what a function prints while it is tested is for nobody
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            try:
                serve(connect(path), shell.user_ns)
            finally:
                os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


if __name__ == "__main__":
    main(*sys.argv[1:])
