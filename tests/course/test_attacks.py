"""What a clever student tries. Each cell is run as a submission's; what it prints says how far it came."""

import os
import socket
import subprocess
import sys
import time

import pytest
from nbformat.v4 import new_code_cell

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e .[course]")

from minisaobp.course import student
from minisaobp.course.grader import execute, scores
from minisaobp.course.process import Limits, Student, StudentError, _account
from minisaobp.course.submission import restored
from tests.course.test_submission import LIMITS, graded, handed_in, handed_out, solved  # noqa: F401

shut_in = pytest.mark.skipif(not student.landlock_version(), reason="this kernel has no Landlock")
HARNESS = """
import gc
harness = next(o for o in gc.get_objects() if isinstance(o, dict) and "LARGEST" in o)  # globals of student.py
"""
ANSWER = "def twice(x):\n    return 2 * x"


def printed(nb, *sources, limits=LIMITS):
    """What cells of the student's own print, and their errors."""
    nb.cells[2:2] = [new_code_cell(source) for source in sources]
    execute(nb, solved(), limits)
    own = nb.cells[2 : 2 + len(sources)]
    said = ["".join(o.get("text", "") or o.get("evalue", "") for o in cell.outputs) for cell in own]
    return said if len(said) > 1 else said[0]


def test_the_package_is_out_of_reach(handed_in):  # noqa: F811
    for said in printed(
        handed_in,
        "from minisaobp import refine",
        "import sys\nsys.modules.pop('minisaobp', None)\nimport minisaobp.bp",
        "import importlib\nimportlib.import_module('minisaobp')",
        HARNESS + "harness.update(REFUSED=(), PACKAGE='', forbid=None)\nimport minisaobp",
    ):
        assert "No module named 'minisaobp" in said or "minisaobp cannot be imported or read" in said


@pytest.mark.parametrize("attempt", ["import minisaobp.bp", "open('minisaobp/bp.py')", "__import__('os').kill(1, 0)",
                                     "import subprocess; subprocess.run(['true'])"])  # fmt: skip
def test_without_landlock_python_refuses(attempt):
    code = f"""
import runpy, sys
student = runpy.run_path({student.__file__!r}, run_name="student")
sys.dont_write_bytecode = True
student["forbid"]()
{attempt}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "graded" in done.stderr.splitlines()[-1] and done.returncode == 1, done.stderr


READERS = {
    "open": "print(open(FILE).read())",
    "folder": "import os\nprint(os.listdir(os.path.dirname(FILE)))",
    "program": "import subprocess\nprint(subprocess.run(['cat', FILE], capture_output=True, text=True).stdout)",
    "shell": "out = !cat $FILE\nprint(out)",
    "descriptor": "import os\nprint(os.read(os.open(FILE, 0), 99))",
    "link": "import os\nos.link(FILE, 'mine')\nprint(open('mine').read())",
    "symlink": "import os\nos.symlink(FILE, 'mine')\nprint(open('mine').read())",
    "rename": "import os\nos.rename(FILE, 'mine')\nprint(open('mine').read())",
    "C": "import ctypes\nc = ctypes.CDLL(None)\nb = ctypes.create_string_buffer(99)\n"
         "c.read(c.open(FILE.encode(), 0), b, 98)\nprint(b.value)",
    "process": "import os\nprint(open(f'/proc/{os.getppid()}/root' + FILE).read())",
    "environment": "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())",
    "memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\nprint('secret')",
    "magic": "%cat {FILE}\n%load {FILE}\nget_ipython().run_line_magic('run', FILE)",
    "kit": HARNESS + "import os\nr = os.path.join(os.path.dirname(harness['__file__']), '..', '..')\n"
           "print(r, 'secret', os.listdir(r + '/notebooks'))",
}  # fmt: skip


@shut_in
def test_files_of_the_teacher_are_out_of_reach(handed_in, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OF_THE_GRADER", "secret")
    path = tmp_path / "solutions"
    path.write_text("print('secret')")
    sources = [f"FILE = {str(path)!r}\n{code}" for code in READERS.values()]
    for way, said in zip(READERS, printed(handed_in, *sources), strict=True):
        assert said and "secret" not in said and "solutions'" not in said.replace(str(path), ""), (way, said)
    assert path.read_text() == "print('secret')" and scores(handed_in)["p1-a"] == (2, 2)


@shut_in
def test_nothing_is_written_elsewhere_and_no_network(handed_in, tmp_path):  # noqa: F811
    (tmp_path / "z").touch()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = printed(handed_in, f"""
import os, socket
for attempt in (lambda: open({str(tmp_path / "x")!r}, "w"), lambda: os.mkdir({str(tmp_path / "y")!r}),
                lambda: os.remove({str(tmp_path / "z")!r}), lambda: open("/tmp/for-a-friend", "w"),
                lambda: socket.create_connection(("127.0.0.1", {port}), 2), lambda: open("mine", "w").write("a")):
    try:
        print(attempt())
    except OSError as error:
        print(type(error).__name__)
""")  # fmt: skip
    assert said.split() == 5 * ["PermissionError"] + ["1"] and os.listdir(tmp_path) == ["z"]


def test_the_grader_cannot_be_signalled_and_nothing_outlives_the_grading(handed_in):  # noqa: F811
    said = printed(handed_in, f"""
import ctypes, os, resource, signal, subprocess, sys
for attempt in (lambda: os.kill({os.getpid()}, 0), lambda: os.killpg({os.getpgid(0)}, 0), os.fork,
                lambda: subprocess.Popen([sys.executable, "-c", "0"], start_new_session=True),
                lambda: os.system("true"), lambda: os.posix_spawn("/bin/true", ["true"], {{}}),
                lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))):
    try:
        print(attempt())
    except PermissionError as error:
        print("refused")
""")  # fmt: skip
    assert said.split() == 7 * ["refused"]
    if student.landlock_version() >= 6:  # also past Python
        nb = printed(handed_in, f"import ctypes\nprint(ctypes.CDLL(None).kill({os.getpid()}, 0))")
        assert nb == "-1\n"


DRIP = """
import gc, os, socket, struct, time
sockets = [s for s in gc.get_objects() if isinstance(s, socket.socket)]
for s in sockets:
    s.setblocking(True)
    s.sendall(struct.pack(">Q", 1000))
    while True:
        s.sendall(b" ")
        time.sleep(0.2)
"""


def test_an_answer_byte_by_byte_ends_in_time(handed_in):  # noqa: F811
    start = time.monotonic()
    assert "longer than 1.5 seconds" in printed(handed_in, DRIP, limits=Limits(seconds=1.5))
    handed_in.cells[3].source = "def twice(x):\n    " + DRIP.replace("\n", "\n    ")
    execute(handed_in, solved(), Limits(seconds=1.5))
    assert "longer than 1.5 seconds" in handed_in.cells[4].outputs[0].evalue
    assert time.monotonic() - start < 60


def test_a_notebook_of_endless_loops_ends_in_time(handed_in, monkeypatch):  # noqa: F811
    monkeypatch.setattr("minisaobp.course.process.CELLS", 4)
    handed_in.cells[2:2] = [new_code_cell(ANSWER), *(new_code_cell("while True: pass") for _ in range(40))]
    execute(handed_in, solved(), Limits(seconds=2))
    assert "not run: the cells before took 8 seconds together" in str(handed_in.cells[30].outputs)
    assert scores(handed_in)["p1-a"] == (2, 2)  # by the cell before


def test_a_process_that_makes_no_copies_ends_in_time(handed_in):  # noqa: F811
    start = time.monotonic()
    printed(handed_in, "import os\nos.fork = lambda: 7", limits=Limits(seconds=2))
    assert scores(handed_in)["p1-a"] == (0, 2) and time.monotonic() - start < 30


def test_a_copy_in_a_loop_does_not_slow_down_the_others():
    with Student(Limits(seconds=1)) as process:
        process.run("import os\n\n\ndef me():\n    return os.getpid()\n\n\ndef f():\n    while True: pass")
        copy = process.copy()
        pid = copy.ask({"call": "me", "arguments": [], "named": {}})["result"]
        with pytest.raises(StudentError, match="a loop that never ends"):
            copy.ask({"call": "f", "arguments": [], "named": {}})
        copy.close()
        deadline = time.monotonic() + 20  # killed at once, and gone when its parent has taken notice
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < deadline:
                process.run("pass")
                os.kill(pid, 0)


@pytest.mark.parametrize(
    "answer",
    [
        "def twice(x):\n    raise ValueError('\\ud800')",
        "def twice(x):\n    return '\\ud800'",
        "print('\\ud800')\nraise ValueError('\\ud800\\x00')",
        "deep = []\nfor _ in range(100_000):\n    deep = [deep]\n\n\ndef twice(x):\n    return deep",
        "class E(Exception):\n    __name__ = 7\n\n\ndef twice(x):\n    raise E(E)",
    ],
)
def test_text_that_no_file_holds(handed_in, tmp_path, answer):  # noqa: F811
    import nbformat

    handed_in.cells[2].source = answer
    outputs, points = graded(handed_in)
    assert points["p1-a"] == (0, 2) and ("twice" in outputs[-1].evalue or "answer" in outputs[-1].evalue)
    nbformat.write(handed_in, tmp_path / "graded.ipynb")


def test_sources_that_no_file_holds(handed_in, handed_out, tmp_path):  # noqa: F811
    import nbformat

    handed_in.cells[2].source = ANSWER + "  # \ud800"
    handed_in.cells.append(new_code_cell("'\ud800'"))
    nb, _ = restored(handed_in, handed_out)
    nbformat.write(nb, tmp_path / "graded.ipynb")
    execute(nb, solved(), LIMITS)
    assert scores(nb)["p1-a"] == (2, 2)


FORGED = """
harness["pictures"] = lambda: ['"><script>alert(1)</script>', "QUJD", 7, "A" * 10**7]
harness["describe"] = lambda error: {"kind": [7] * 9, "message": {"a": 1}, "lines": "no list"}
print(1)
raise ValueError
"""


def test_a_picture_is_a_picture(handed_in):  # noqa: F811
    assert printed(handed_in, HARNESS + FORGED, "raise ValueError") == ["1\n{'a': 1}", "{'a': 1}"]
    assert not [o for c in handed_in.cells[2:4] for o in c.outputs if o.output_type == "display_data"]
    assert scores(handed_in)["p1-a"] == (2, 2)


def test_a_flood_of_output_drowns_no_later_cell(handed_in):  # noqa: F811
    source = "line = 'x' * 10**6\nfor _ in range(100):\n    print(line)"
    said = printed(handed_in, source)
    assert len(said) < 21_000
    handed_in.cells[3].source = f"print('here')\n{ANSWER}"
    execute(handed_in, solved(), LIMITS)
    assert handed_in.cells[3].outputs[0].text == "here\n" and scores(handed_in)["p1-a"] == (2, 2)


def test_the_account_has_no_groups_of_the_graders():
    if os.geteuid() != 0:
        pytest.skip("only root can run code as somebody else")
    done = subprocess.run(["id"], capture_output=True, text=True, check=True, **_account("nobody"))
    assert "root" not in done.stdout and done.stdout.count("(nobody)") == 1, done.stdout
