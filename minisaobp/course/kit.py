"""Builds the problem sets for students and grades what they hand in, with nbgrader and without a server.

The folder of a course, in nbgrader's layout:

    source/SET/SET.ipynb              the teacher's: solutions and hidden tests
    release/SET/SET.ipynb             the students': stubs and visible tests
    submitted/STUDENT/SET/SET.ipynb   put here by the teacher, or by nbgrader's collect
    autograded/, feedback/            made by grading: notebooks with outputs, pages for the students
    gradebook.db, grades.csv          the scores, cell by cell and problem by problem
"""

import copy
import csv
import io
import logging
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbgrader.api import Gradebook, MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.coursedir import CourseDirectory
from traitlets.config import Config

from ..files import write_whole
from .grader import execute, read, scores
from .process import CannotGrade
from .student import landlock_version
from .submission import BEGIN_HIDDEN, BEGIN_SOLUTION, is_manual, is_setup, is_solution, is_test, restored

SOURCE = Path(__file__).parents[2] / "notebooks" / "course"
CONFIG = '''"""nbgrader's configuration of this course. Your own lines go below: `course build` leaves them alone."""

from minisaobp.course.kit import configure

c = get_config()  # noqa: F821
configure(c, course_id={course_id!r})
'''


def configure(config, course_id):
    """Submissions run in processes of their own, and feedback tells no hidden test."""
    config.CourseDirectory.course_id = course_id
    config.Autograde.sanitize_preprocessors = [
        "minisaobp.course.preprocessors.Restore",
        "nbgrader.preprocessors.ClearOutput",
        "nbgrader.preprocessors.OverwriteKernelspec",
        "nbgrader.preprocessors.OverwriteCells",
        "nbgrader.preprocessors.CheckCellMetadata",
    ]
    config.Autograde.autograde_preprocessors = [
        "minisaobp.course.preprocessors.ExecuteApart",
        "nbgrader.preprocessors.LimitOutput",
        "nbgrader.preprocessors.SaveAutoGrades",
        "nbgrader.preprocessors.AssignLatePenalties",
        "nbgrader.preprocessors.CheckCellMetadata",
    ]
    config.GenerateFeedback.preprocessors = [
        "minisaobp.course.preprocessors.ShowGrades",
        "minisaobp.course.preprocessors.HideTests",
        "nbconvert.preprocessors.CSSHTMLHeaderPreprocessor",
    ]


warnings.filterwarnings("ignore", module="nbgrader")  # it misuses SQLAlchemy, harmlessly
warnings.filterwarnings("ignore", message="Non-unique cell id")  # of copied cells, which `restored` speaks of


class Bad(Exception):
    """A folder or a notebook that cannot be built or graded, in one line."""


def set_names(folder):
    return sorted(path.name for path in Path(folder).glob("*/") if (path / f"{path.name}.ipynb").is_file())


# ---- checks that need no nbgrader -----------------------------------------------------------------------------------


def check_solved(source, limits, what):
    """Bad unless the solutions score full marks here: a missing package would otherwise be everybody's 0."""
    nb = copy.deepcopy(source)
    try:
        execute(nb, source, limits)
    except CannotGrade as error:
        raise Bad(f"{what}: {error}; nothing was graded") from None
    lost = [name for name, (score, points) in scores(nb).items() if score is not None and score < points]
    if lost:
        cell = next(c for c in nb.cells if c.metadata.get("nbgrader", {}).get("grade_id") == lost[0])
        raise Bad(
            f"{what}: the solutions themselves fail {', '.join(lost)} ({cell.outputs[-1].evalue}); nothing was graded"
        )


def graded(submitted, source, release, limits):
    """{grade_id: (score, points)} of a submission, without nbgrader: no gradebook, no feedback."""
    nb, _ = restored(submitted, release)
    tests = {c.metadata.nbgrader.grade_id: c.source for c in source.cells if is_test(c)}
    for cell in nb.cells:
        if is_test(cell):
            cell.source = tests[cell.metadata.nbgrader.grade_id]
    execute(nb, source, limits)
    return scores(nb)


def check_empty(source, release, limits, what):
    """Bad unless a submission without answers scores 0, or if the release holds a solution or a hidden test."""
    free = [name for name, (score, _) in graded(release, source, release, limits).items() if score]
    if free:
        raise Bad(f"{what}: without an answer, {', '.join(free)} is passed already")
    secrets = secret_lines(source)
    text = "\n".join(cell.source for cell in release.cells)
    for line in text.split("\n"):
        if line.strip() in secrets or any(mark in line for mark in (BEGIN_SOLUTION, BEGIN_HIDDEN)):
            raise Bad(f"{what}: the release would tell {line.strip()!r}")
    if any(cell.get("outputs") for cell in release.cells):
        raise Bad(f"{what}: the release would have outputs")


def secret_lines(source):
    """The lines of solutions and hidden tests that students must not see.

    What stands elsewhere in the notebook as well is no secret if it is of a hidden test (a call, say), an import or
    short; but a longer line of a solution is one wherever it stands.
    """
    lines = {"SOLUTION": set(), "HIDDEN TESTS": set(), None: set()}
    for cell in source.cells:
        inside = None
        for line in map(str.strip, cell.source.split("\n")):
            if mark := re.match(r"### (BEGIN|END) (SOLUTION|HIDDEN TESTS)", line):
                inside = mark[2] if mark[1] == "BEGIN" else None
            elif len(line) > 3:
                lines[inside].add(line)
    told = {line for line in lines["SOLUTION"] if len(line) > 20 and not line.startswith(("import ", "from "))}
    return (lines["SOLUTION"] | lines["HIDDEN TESTS"]) - lines[None] | told


def check_form(nb, what):
    """Bad unless every cell of a source notebook is what nbgrader and `grader` need."""
    seen = set()
    for cell in nb.cells:
        about = cell.metadata.get("nbgrader", {})
        identity = about.get("grade_id")
        if about.get("schema_version") != 3 or not identity or identity in seen:
            raise Bad(f"{what}: cell {identity or cell.source[:30]!r} needs nbgrader metadata of its own (schema 3)")
        seen.add(identity)
        if is_test(cell) and cell.cell_type == "code" and not re.fullmatch(r"p\d+-\w+", identity):
            raise Bad(f"{what}: the test {identity!r} should be named after its problem, as in p1-a")
        if is_setup(cell) or is_test(cell):
            try:
                compile(cell.source, identity, "exec")
            except SyntaxError as error:
                raise Bad(f"{what}: cell {identity} is not plain Python ({error})") from None
    if not any(is_solution(cell) for cell in nb.cells):
        raise Bad(f"{what}: has no answer cell")


# ---- build ----------------------------------------------------------------------------------------------------------


def build(course, limits, say, source=SOURCE):
    """Make or renew source/, release/ and the configuration of a course's folder; {set: points}."""
    course, points = Path(course), {}
    notebooks = {name: _notebook(Path(source) / name / f"{name}.ipynb") for name in set_names(source)}
    if not notebooks:
        raise Bad(f"{source}: no problem set there")
    for name, nb in notebooks.items():
        check_form(nb, name)
        yours = course / "source" / name / f"{name}.ipynb"
        if yours.is_file() and _text(_notebook(yours)) != _text(nb):
            raise Bad(f"{yours} is not {source}'s: build from it (--source {course / 'source'}), or move it away")
    for name, nb in notebooks.items():
        check_solved(nb, limits, name)
    settings = course / "nbgrader_config.py"
    if not settings.exists():
        write_whole(settings, lambda file: file.write(CONFIG.format(course_id=course.resolve().name).encode()))
    for name, nb in notebooks.items():
        folder = course / "source" / name
        if folder.resolve() != (Path(source) / name).resolve():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"{name}.ipynb", lambda file, nb=nb: file.write(_text(nb).encode()))
        _done(_api(course, limits).generate_assignment(name, force=True, create=True), f"{name} cannot be released")
        release = read(course / "release" / name / f"{name}.ipynb")
        try:
            check_empty(nb, release, limits, name)
        except BaseException:  # an interrupt, too: what has not been checked is not for students
            shutil.rmtree(course / "release" / name)
            raise
        points[name] = sum(p for _, p in scores(nb).values())
        say(f"{name}: {points[name]:g} points; solutions score full marks, an empty submission 0")
    return points


def _text(nb):
    """The file of a notebook, without outputs."""
    nb = copy.deepcopy(nb)
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(nb)


def _notebook(path):
    try:
        return read(path)
    except FileNotFoundError:
        raise Bad(f"{path}: missing; `course build` makes it") from None
    except Exception as error:  # whatever nbformat makes of a file that is no notebook
        raise Bad(f"{path.name} is no notebook ({type(error).__name__})") from None


# ---- grade ----------------------------------------------------------------------------------------------------------


WAITS = "to be graded by hand"
CHANGED = "handed in anew since it was graded by hand: to be looked at again"


class Grade(NamedTuple):
    student: str
    set: str
    problem: str
    score: float | str  # "" while it waits for a person
    points: float
    note: str


def submissions(course):
    """[(student, set)] of what was handed in, in order; Bad if there is nothing, or nothing released."""
    course = Path(course)
    released = set_names(course / "release")
    if not released:
        raise Bad(f"{course}: no release/SET/SET.ipynb there; `course build` makes it")
    if not (course / "gradebook.db").is_file():
        raise Bad(f"{course / 'gradebook.db'}: missing; `course build` makes it")
    found = sorted(
        (student.name, name) for student in (course / "submitted").glob("*/") for name in released
        if (student / name).is_dir()
    )  # fmt: skip
    if not found:
        raise Bad(f"{course}: expected submitted/STUDENT/SET/SET.ipynb, with SET one of {', '.join(released)}")
    return found


def grade(course, limits, say, progress=iter):
    """Grade every submission of a course; writes grades.csv and feedback/. Returns the grades and the failures."""
    course = Path(course)
    found = submissions(course)
    if not landlock_version():
        say("this machine has no Landlock: a submission can read the files that you can read (see the course's README)")
    for name in sorted({name for _, name in found}):
        check_solved(_notebook(course / "source" / name / f"{name}.ipynb"), limits, name)
    for folder in sorted((course / "submitted").glob("*/*/")):
        if (folder.parent.name, folder.name) not in found:
            say(f"{folder.parent.name}, {folder.name}: not graded: no set of that name was released")
    grades, failed = [], []
    api = _api(course, limits)
    for student, name in progress(found):
        path = course / "submitted" / student / name / f"{name}.ipynb"
        try:
            for line in notes(path, course / "release" / name / f"{name}.ipynb"):
                say(f"{student}, {name}: {line}")
            before = _graded_by_hand(course, student, name)
            _done(api.autograde(name, student, force=True, create=True), "nbgrader gave up")
            rows = _grades(course, student, name, before)
            _done(api.generate_feedback(name, student, force=True), "no feedback could be written")
        except Bad as error:
            failed.append(f"{student}, {name}: not graded: {error}")
            say(failed[-1])
            continue
        grades += rows
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Grade._fields)
    writer.writerows([f"{cell:g}" if isinstance(cell, float) else cell for cell in row] for row in grades)
    write_whole(course / "grades.csv", lambda file: file.write(text.getvalue().encode()))
    return grades, failed


def notes(path, release):
    """What had to be put right in a submission, in words; Bad if it is no notebook."""
    if not path.is_file():
        others = sorted(p.name for p in path.parent.glob("*.ipynb"))
        raise Bad(f"expected {path.name}, found {', '.join(others) or 'no notebook'}")
    submitted, released = _notebook(path), _notebook(release)
    try:
        return restored(submitted, released)[1]
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but not of a notebook
        raise Bad(f"{path.name} is no notebook ({type(error).__name__})") from None


def _graded_by_hand(course, student, name):
    """What the student had written, and the cells in which a person has judged it (the names of their grades)."""
    path = course / "autograded" / student / name / f"{name}.ipynb"
    if not path.is_file():
        return None, set()
    with Gradebook(_database(course)) as gradebook:
        try:
            grades = gradebook.find_submission_notebook(name, name, student).grades
        except MissingEntry:
            return None, set()
        return _answers(read(path)), {g.name for g in grades if g.manual_score is not None and not g.needs_manual_grade}


def _answers(nb):
    return [cell.source for cell in nb.cells if not cell.metadata.get("nbgrader", {}).get("locked")]


def _grades(course, student, name, before):
    """The rows of one submission: its problems, then the total. before: of `_graded_by_hand`, before it was graded."""
    executed = read(course / "autograded" / student / name / f"{name}.ipynb")
    failures = {c.metadata.nbgrader.grade_id: c.outputs[-1].evalue for c in executed.cells
                if is_test(c) and c.get("outputs") and c.outputs[-1].output_type == "error"}  # fmt: skip
    by_hand = {c.metadata.nbgrader.grade_id for c in executed.cells if is_manual(c)}
    answers, judged = before
    problems = {}
    with Gradebook(_database(course)) as gradebook:
        for cell in gradebook.find_submission_notebook(name, name, student).grades:
            if cell.name in judged and answers == _answers(executed):
                cell.needs_manual_grade = False  # nbgrader asks for a second look whenever it has run
            words, score = failures.get(cell.name), cell.score
            if cell.manual_score is not None:
                words = CHANGED if cell.needs_manual_grade else None
            elif cell.auto_score is None:
                words, score = WAITS, None
            elif cell.name in by_hand:
                words = "nothing was written"
            problems.setdefault(cell.name.partition("-")[0], []).append((cell.name, score, cell.max_score, words))
        gradebook.db.commit()
    rows = []
    for problem, cells in sorted(problems.items(), key=lambda item: (len(item[0]), item[0])):
        said = list(dict.fromkeys(" ".join(words.split()) for *_, words in sorted(cells) if words))
        said = [words for words in said if not any(other != words and other.startswith(words) for other in said)]
        score = "" if any(score is None for _, score, *_ in cells) else sum(score for _, score, *_ in cells)
        rows.append(Grade(student, name, problem, score, sum(points for _, _, points, _ in cells), "; ".join(said)))
    notes = "; ".join(row.note for row in rows)
    note = "without what is to be graded by hand" if WAITS in notes else CHANGED if CHANGED in notes else ""
    total = sum(row.score or 0 for row in rows)
    return [*rows, Grade(student, name, "total", total, sum(row.points for row in rows), note)]


# ---- nbgrader -------------------------------------------------------------------------------------------------------


def _database(course):
    return f"sqlite:///{Path(course).resolve() / 'gradebook.db'}"


def _api(course, limits):
    programs = os.path.dirname(sys.executable)  # nbgrader calls `alembic`, also where no environment is activated
    if programs not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = programs + os.pathsep + os.environ["PATH"]
    config = Config()
    configure(config, Path(course).resolve().name)
    config.CourseDirectory.root = str(Path(course).resolve())
    config.ExecuteApart.seconds, config.ExecuteApart.megabytes = limits.seconds, limits.megabytes
    config.ExecuteApart.user = limits.user or ""
    config.NbGraderAPI.log_level = logging.WARNING
    config.Exchange.root = str(Path(course).resolve())  # none is used
    return NbGraderAPI(CourseDirectory(config=config), config=config)


def _done(result, what):
    """Bad unless nbgrader, which reports failure in a dict and an exit code of 0, succeeded."""
    if result["success"]:
        return
    log = f"{result.get('log')}\n{result.get('error')}"
    if "KeyboardInterrupt" in log:
        raise KeyboardInterrupt
    errors = re.findall(r"^\s*[\w.]*(?:Error|CannotGrade|Entry|TooOld|TooNew)\w*: .*", log, re.MULTILINE)
    raise Bad(f"{what}: {errors[0].strip() if errors else log.splitlines()[0]}")
