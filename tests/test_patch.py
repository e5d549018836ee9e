"""A study's own Python file: in force inside, without a trace outside."""

import pytest

from minisaobp.nn import Bert, attention
from minisaobp.patch import Patch

HEAD = """
import contextlib
from minisaobp.nn import attention
exact = attention.softmax
"""
GOOD = (
    HEAD
    + """
@contextlib.contextmanager
def patched():
    attention.softmax = lambda *x: exact(*x)
    try:
        yield
    finally:
        attention.softmax = exact
"""
)


def written(folder, text):
    (folder / "own.py").write_text(text)
    return Patch(folder, "own.py")


@pytest.fixture(autouse=True)
def _whole_again():
    softmax = attention.softmax
    yield
    attention.softmax = softmax


def test_in_force_inside_alone(tmp_path):
    exact, patch = attention.softmax, written(tmp_path, GOOD)
    (tmp_path / "own.py").write_text("another one")  # while the study is at work: what was read counts
    for _ in range(2):
        with patch.open():
            assert attention.softmax is not exact
        assert attention.softmax is exact
    with pytest.raises(ZeroDivisionError), patch.open():
        raise ZeroDivisionError
    (tmp_path / "own.py").write_bytes(GOOD.replace("\n", "\r\n").encode())  # a checkout of another system
    assert Patch(tmp_path, "own.py").sha256 == patch.sha256 != written(tmp_path, GOOD + "\n").sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a context manager patched.. in .*own.py .KeyError: 'patched'"),
        ("patched = None", "TypeError: 'NoneType' object is not callable"),
        ("def patched(): pass", "context manager protocol"),
        ("def patched(:", "SyntaxError"),
        (HEAD + "def patched(): raise RuntimeError('no')", "RuntimeError: no"),
        (GOOD.replace("attention.softmax = lambda *x: exact(*x)", "raise OSError('no')"), "OSError: no"),
        # while it is read, not while it is open
        (GOOD + "attention.softmax = print", "own.py leaves minisaobp.nn.attention.softmax changed outside patched"),
        (GOOD.replace("        attention.softmax = exact", "        pass"), "leaves minisaobp.nn.attention.softmax ch"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_when_it_is_read(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, text)


def test_one_that_is_not_undone_after_a_failure_is_found(tmp_path):
    patch = written(tmp_path, GOOD.replace("try", "if True").replace("    finally:\n        ", "    "))
    with patch.open():
        pass
    with pytest.raises(ValueError, match=r"nn.attention.softmax changed outside"), patch.open():
        raise FloatingPointError("diverges")
    with pytest.raises(KeyboardInterrupt), patch.open():  # Ctrl-C stays what it is
        raise KeyboardInterrupt


METHOD = """
import contextlib
from minisaobp.nn import Bert

@contextlib.contextmanager
def patched():
    Bert.scored = lambda *x: None
    yield
"""


def test_methods_are_looked_at_too(tmp_path):
    try:
        with pytest.raises(ValueError, match=r"leaves minisaobp.nn.\w+.Bert.scored changed"):
            written(tmp_path, METHOD)
    finally:
        del Bert.scored  # which it inherits
