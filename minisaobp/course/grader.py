"""Runs a submission and its tests, each in a process of its own (`process` has the student's).

The tests are executed here, cell by cell. Where a test names a function of the student's, it gets a stand-in: a call is
carried to the student's process with copies of the arguments, and what comes back is numbers, arrays and text.

A test that fails where an earlier problem is wrong, too, is asked again, with the right answers to the earlier problems
in the place of the student's: who builds on a mistake pays for it once.
"""

import ast
import builtins
import contextlib
import io
import traceback
import warnings

import nbformat
import numpy as np
from nbformat.v4 import new_output

from .process import CannotGrade, Student, StudentError, error_output
from .student import NO_ANSWER
from .submission import BEGIN_HIDDEN, is_manual, is_setup, is_solution, is_test

TEST = "<test>"


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
            if kind == NO_ANSWER:
                raise StudentError(f"{self.name} returned what is no answer: {message}")
            if kind == "NotImplementedError":
                raise StudentError(f"{self.name} is not written yet")
            raise StudentError(f"{self.name} raised {_known(kind)}: {message}", lines)
        for mine, theirs in zip(arguments, reply.get("changed") or (), strict=False):
            if isinstance(mine, np.ndarray) and mine.shape == getattr(theirs, "shape", None):
                mine[...] = theirs
        return reply.get("result")


def execute(nb, source, limits):
    """Run every code cell of a notebook, its tests against the student's answers; `source` is the teacher's notebook.

    The tests run when all other cells are done, each on a copy of the state that the notebook was in at its place: so
    no cell can show what a function was given by a hidden test.
    """
    answers = [cell for cell in source.cells if cell.cell_type == "code" and is_solution(cell)]
    names = {name for cell in answers for name in defined_names(cell)}
    setup, tests = [], []  # sources that tests build on; what to do at last
    with Student(limits) as process:
        for number, cell in enumerate((c for c in nb.cells if c.cell_type == "code"), 1):
            cell.execution_count = number
            if is_test(cell):
                tests.append((cell, setup[:], process.copy()))
                continue
            if is_setup(cell):
                setup.append(cell.source)
            cell.outputs = process.run(cell.source)
        tested, wrong = [], []  # problems
        for cell, before, copy in tests:
            earlier = [a for a in answers if problem(a) in tested and problem(a) != problem(cell)]
            replaced = {n for a in earlier if problem(a) in wrong for n in defined_names(a)}
            spare = process.copy(copy) if replaced else None
            cell.outputs = run_test(cell.source, _namespace(before), names, copy)
            copy.close()
            if spare and has_error(cell.outputs):
                right = {"sources": before + [a.source for a in earlier], "names": sorted(replaced)}
                outputs = run_test(cell.source, _namespace(before), names, spare, right)
                cell.outputs = cell.outputs if has_error(outputs) else outputs
                spare.close()
            tested.append(problem(cell))
            if has_error(cell.outputs):
                wrong.append(problem(cell))


def _namespace(setup):
    """What a test cell sees: made anew each time, since a student's function may have written into the last one."""
    namespace = {"__name__": "__tests__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the student's process shows it
            for source in setup:
                exec(compile(source, "<setup>", "exec"), namespace)
    except Exception as error:
        raise CannotGrade(f"the setup of the tests fails here: {type(error).__name__}: {error}") from None
    return namespace


def run_test(source, namespace, names, copy, right=None):
    """Outputs of a test cell; the last one is an error if a test failed. right: what the copy puts in place before."""
    tree = ast.parse(source)
    used = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    own = {n.id for n in used if isinstance(n.ctx, ast.Store)} | namespace.keys() | set(dir(builtins))
    wanted = {n.id for n in used} & names - own
    printed = io.StringIO()
    try:
        if right:
            copy.ask(right)
            print("This test passes with the right answers to earlier problems in the place of yours.", file=printed)
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


def has_error(outputs):
    return any(output.output_type == "error" for output in outputs)


def _failure(error, source):
    """In words, why a test failed. Of a hidden test only what stands before a colon: the rest may tell its numbers."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == TEST]
    before = source.splitlines()[: lines[-1]] if lines else []
    hidden = any(BEGIN_HIDDEN in line for line in before)
    words = str(error) or "a test failed"
    if not isinstance(error, (AssertionError, StudentError)):  # a test that stumbled over what came back
        words = f"the answer is not of the form asked for: {type(error).__name__}, {error}"
    if hidden:
        return error_output("Hidden test", words.partition(":")[0])
    return error_output("Test", words, getattr(error, "lines", ()))


def _known(kind):
    """The name of an exception, if it is one of Python's; others are the student's, and could say anything."""
    known = isinstance(kind, str) and isinstance(getattr(builtins, kind, None), type)
    return kind if known else "an exception of its own"


def problem(cell):
    """The problem of a test or an answer, from its name: p1-a belongs to p1."""
    return cell.metadata.nbgrader.grade_id.partition("-")[0]


def defined_names(cell):
    """The names that an answer cell defines: what the tests may ask a student's process for."""
    names = set()
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def scores(nb):
    """{grade_id: (score, points)} of an executed notebook; score is None where a person has to judge."""
    found = {}
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        if is_manual(cell):
            found[about["grade_id"]] = (None, about["points"])
        elif is_test(cell):
            found[about["grade_id"]] = (0 if has_error(cell.outputs) else about["points"], about["points"])
    return found


def read(path):
    return nbformat.read(path, as_version=4)
