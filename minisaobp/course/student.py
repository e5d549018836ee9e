"""The process that a student's code runs in. It knows no test, and what it sends is not trusted.

Started by `grader.Student` as a program, isolated from this package: python -I student.py SOCKET SECONDS MEGABYTES.
It connects to the socket and answers, one message after another:

    {"run": source}     runs a cell                          -> {"error": ..., "pictures": [...]}
    {"fork": true}      makes a copy of the process, which connects on its own and serves one test cell:
    {"get": name}       what the name stands for             -> {"function": true}, {"value": ...} or {"missing": true}
    {"call": name, "arguments": [...], "named": {...}}       -> {"result": ..., "changed": [...]}
    {"sources": [...], "names": [...]}     puts right answers in the place of the student's    -> {}

The copy is thrown away after the test cell: no test can tell a later cell anything, and one that never ends, or ends
the process, takes nothing with it. A message is JSON behind its length, arrays as their bytes; nothing is pickled.

Before any of the student's code runs, the kernel is told (`shut_in`) to keep the process to files of the system, of
Python, and of its own folder, and Python itself (`forbid`) refuses new processes, signals and this package.
"""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import sys
import time
import traceback

LARGEST = 2**26  # bytes of a message
KINDS = "biufc"  # NumPy's kinds of numbers
NO_ANSWER = "no answer"  # in the place of an exception's name: the function returned what cannot be handed over
PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
SYSTEM = ("/usr", "/lib", "/lib64", "/etc", "/nix", "/sys/devices/system/cpu", "/proc/cpuinfo", "/proc/meminfo")
REFUSED = frozenset(
    ["os.exec", "os.fork", "os.forkpty", "os.kill", "os.killpg", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn",
     "resource.prlimit", "resource.setrlimit", "subprocess.Popen"]
)  # fmt: skip


def send(connection, value):
    data = json.dumps(encode(value)).encode()
    if len(data) > LARGEST:
        raise ValueError(f"{len(data) / 2**20:.0f} MB are too much to hand over")
    connection.sendall(struct.pack(">Q", len(data)) + data)


def receive(connection, deadline=None):
    """The next message; EOFError when there is none, ValueError when it is none of ours.

    deadline: of time.monotonic, for the whole message, after which it is a TimeoutError.
    """
    (length,) = struct.unpack(">Q", _exactly(connection, 8, deadline))
    if length > LARGEST:
        raise ValueError("a message too long")
    return decode(json.loads(_exactly(connection, length, deadline)))


def _exactly(connection, length, deadline):
    parts = []
    while length:
        if deadline:
            connection.settimeout(max(deadline - time.monotonic(), 1e-3))
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
        raise TypeError(f"expected an array of numbers, got {type(value).__name__} of {array.dtype}")
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


def shut_in(folder):
    """Let the kernel refuse this process, for good, all files but the system's, Python's and its own, TCP, programs of
    any kind, and signals to others (docs.kernel.org/userspace-api/landlock.html). False where there is no Landlock:
    before Linux 5.13, and on macOS.
    """
    version = landlock_version()
    if not version:
        return False
    import ctypes

    def system(number, *arguments):
        done = libc.syscall(number, *arguments)
        if done < 0:
            raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
        return done

    libc = ctypes.CDLL(None, use_errno=True)
    everything = 2 ** (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16) - 1  # rights to files
    of_a_file = 0b1100_0000_0000_0111 & everything
    read, write = 0b1100, everything & ~1  # files and folders; without the right to execute
    ruleset = struct.pack("QQQ", everything, 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0)
    rules = system(444, ruleset, ctypes.c_size_t(len(ruleset)), 0)
    places = [sys.prefix, sys.base_prefix, sys.exec_prefix, *SYSTEM]
    places += [place for place in sys.path if not PACKAGE.startswith(os.path.realpath(place) + os.sep)]
    allowed = dict.fromkeys(places, read) | {"/dev/null": write, "/dev/urandom": read, folder: write}
    for place, rights in allowed.items():
        if os.path.exists(place):
            beneath = os.open(place, os.O_PATH | os.O_CLOEXEC)
            rights = rights if os.path.isdir(place) else rights & of_a_file
            system(445, rules, 1, struct.pack("=Qi", rights, beneath), 0)
            os.close(beneath)
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, which Landlock asks for
    system(446, rules, 0)
    os.close(rules)
    return True


def landlock_version():
    """Of the kernel's Landlock; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    import ctypes

    return max(ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1), 0)


def forbid():
    """Refuse, from Python, what the kernel cannot be asked to: more processes, signals, higher limits, this package
    where it is installed among Python's own, or there is no Landlock. Somebody who knows Python well gets around it.
    """
    refused, own, package = REFUSED, serve.__code__, PACKAGE + os.sep  # out of reach for what a cell assigns
    real, frame = os.path.realpath, sys._getframe

    def hook(event, arguments):
        if event in refused and not (event == "os.fork" and frame(1).f_code is own):
            raise PermissionError(f"{event} is not allowed while your work is graded")
        path = arguments[0] if event == "open" else None
        if isinstance(path, (str, bytes, os.PathLike)) and real(os.fsdecode(path)).startswith(package):
            raise PermissionError("minisaobp cannot be imported or read while your work is graded")

    sys.addaudithook(hook)


def make_shell():
    """IPython without a terminal, so that a cell may use magics, as in Jupyter."""
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    shell.history_manager.enabled = False
    shell.enable_gui = lambda gui=None: None
    shell.system = lambda command: print(f"not run while your work is graded: {command}")
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


def serve(connection, shell, path):
    """Answer one message after another until the other side hangs up."""
    names = shell.user_ns
    while True:
        try:
            request = receive(connection)
        except EOFError:
            return
        if "run" in request:
            reply = run(shell, request["run"])
        elif "fork" in request:
            if os.fork() == 0:
                connection = connect(path)
                with open(os.devnull, "w") as nowhere:  # what a function prints while it is tested is for nobody
                    os.dup2(nowhere.fileno(), 1)
                    os.dup2(nowhere.fileno(), 2)
            continue
        elif "get" in request:
            name = request["get"]
            if name not in names:
                reply = {"missing": True}
            elif callable(names[name]):
                reply = {"function": True}
            else:
                reply = answer(lambda name=name: {"value": names[name]})
        elif "sources" in request:
            reply = answer(lambda request=request: put_in_place(request, names))
        else:
            reply = answer(lambda request=request: call(names[request["call"]], request))
        try:
            send(connection, reply)
        except (TypeError, ValueError, RecursionError) as error:
            send(connection, {"error": {"kind": NO_ANSWER, "message": str(error), "lines": []}})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def put_in_place(request, names):
    """Right answers to other problems, made from nothing of the student's."""
    made = {}
    for source in request["sources"]:
        exec(source, made)
    names.update({name: made[name] for name in request["names"]})
    return {}


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
    shut_in(os.path.dirname(path))  # before there are threads, for which it would not hold
    shell = make_shell()
    limit(int(seconds), int(megabytes))
    connection = connect(path)
    forbid()
    try:
        serve(connection, shell, path)
    finally:
        os._exit(0)  # without what a cell has put into atexit, in a copy as well


def connect(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


if __name__ == "__main__":
    main(*sys.argv[1:])
