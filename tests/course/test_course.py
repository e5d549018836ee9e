"""The commands as a teacher meets them: build, then grade good, empty, broken and hostile submissions."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
from html import unescape

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from tests.course import wrong

SET = "set2_saobp"
FORGED = """
import builtins, os, sys
import numpy.testing

np.allclose = np.array_equal = np.testing.assert_allclose = lambda *a, **k: True
np.isfinite = lambda *a, **k: np.True_


def same(*a, **k): pass
def call(f, *a): return 1
def close(*a): return False


builtins.AssertionError = ValueError
get_ipython().displayhook = lambda *a: 7
"""
SABOTAGE = """
import gc
harness = next(o for o in gc.get_objects() if isinstance(o, dict) and "LARGEST" in o)  # globals of student.py
connect = harness["connect"]
harness["connect"] = lambda path: connect(path).sendall(b"\\0" * 64)
get_ipython().run_cell = lambda *a, **k: None
"""
STUBBORN = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
BARE = '{"cells": [{"cell_type": "code", "metadata": {}}, 7], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
THIEF = """
seen = []


def messages(A, lam):
    import traceback
    seen.append((A.tolist(), lam))
    open("seen", "a").write(repr(seen[-1]))
    raise ValueError("stolen " + repr((A.tolist(), lam)) + "".join(traceback.format_stack()))
"""


def course_command(*arguments, **options):
    command = [sys.executable, "-m", "minisaobp", "course", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def with_cells(nb, *sources, behind=2):
    nb = copy.deepcopy(nb)
    nb.cells[behind:behind] = [new_code_cell(source) for source in sources]
    return nb


def handed_in(solved, empty):
    """{student: notebook} of one set."""
    copied = copy.deepcopy(solved)
    for cell in ("p1-answer", "p1-c", "setup"):
        place = copied.cells.index(wrong.by_identity(copied)[cell])
        copied.cells.insert(place + 1, copy.deepcopy(copied.cells[place]))
    deleted = copy.deepcopy(solved)
    deleted.cells = [
        c for c in solved.cells if c.metadata.nbgrader.grade_id not in ("setup", "p1-a", "p1-b", "text-01")
    ]
    tampered = wrong.with_answer(solved, "p1", "def messages(A, lam):\n    return A")
    for cell in tampered.cells:
        if cell.metadata.nbgrader.grade_id.startswith("p1-"):
            cell.metadata.nbgrader.update(grade=False, points=1000, solution=True)
    library = "import minisaobp as ms\n\n\ndef refine(A, lam):\n    return ms.refine(A, lam)"
    return {
        "ada": solved,
        "bob": empty,
        "copied": copied,
        "deleted": deleted,
        "forger": with_cells(wrong.with_answer(solved, "p1", "def messages(A, lam):\n    return A"), FORGED),
        "hungry": wrong.with_answer(solved, "p1", "def messages(A, lam):\n    return np.ones(10**11)"),
        "library": wrong.with_answer(solved, "p3", library),
        "quitter": with_cells(solved, "import sys\nsys.exit(0)", "import os\nos._exit(0)", "exit()"),
        "saboteur": with_cells(wrong.with_answer(solved, "p1", "def messages(A, lam):\n    return A"), SABOTAGE),
        "stuck": with_cells(solved, "while True: pass", STUBBORN),
        "tampered": tampered,
        "thief": with_cells(wrong.with_answer(solved, "p1", THIEF), "print(seen, open('seen').read())", behind=9),
    }


LOSE_P1 = {"forger", "hungry", "tampered", "thief"}


@pytest.fixture(scope="module")
def graded(course, notebooks):
    for student, nb in handed_in(*notebooks[SET]).items():
        folder = course / "submitted" / student / SET
        folder.mkdir(parents=True)
        nbformat.write(nb, folder / f"{SET}.ipynb")
    (course / "submitted" / "ada" / "set9").mkdir()
    for student, name, text in (("torn", SET, '{"cells": ['), ("bare", SET, BARE), ("renamed", "Untitled", "{}")):
        folder = course / "submitted" / student / SET
        folder.mkdir(parents=True)
        (folder / f"{name}.ipynb").write_text(text)
    done = course_command("grade", course, "--seconds", 10)
    with open(course / "grades.csv", newline="") as file:
        return done, list(csv.DictReader(file))


def problems(rows, student):
    return {row["problem"]: (float(row["score"]), float(row["points"])) for row in rows if row["student"] == student}


@pytest.mark.parametrize("student", ["ada", "copied", "deleted", "quitter", "stuck"])
def test_full_marks(graded, student):
    assert problems(graded[1], student)["total"] == (40, 40), [r for r in graded[1] if r["student"] == student]


def test_nothing_for_nothing(graded):
    assert {score for score, _ in problems(graded[1], "bob").values()} == {0}


@pytest.mark.parametrize("student", [*sorted(LOSE_P1), "library"])
def test_nobody_fools_it(graded, student):
    found, lost = problems(graded[1], student), "p1" if student in LOSE_P1 else "p3"
    assert found[lost][0] == 0
    assert all(score == points for problem, (score, points) in found.items() if problem not in (lost, "total"))


def test_sabotage_pays_nothing(graded):
    assert problems(graded[1], "saboteur")["p1"][0] == 0


def test_it_says_what_was_put_right_and_what_cannot_be_graded(graded):
    done, rows = graded
    said = done.stdout + done.stderr
    assert f"copied, {SET}: cell p1-answer is there 2 times" in said
    assert f"deleted, {SET}: cell p1-a was deleted: put back as it was handed out" in said
    assert f"torn, {SET}: not graded: {SET}.ipynb is no notebook" in said
    assert "ada, set9: not graded: no set of that name was released" in said
    assert f"bare, {SET}: not graded: {SET}.ipynb is no notebook" in said
    assert f"renamed, {SET}: not graded: expected {SET}.ipynb, found Untitled.ipynb" in said
    assert done.returncode == 2 and "3 of the submissions could not be graded" in done.stderr.splitlines()[-1]
    assert "Traceback" not in said and not {"torn", "bare", "renamed"} & {row["student"] for row in rows}
    assert {row["set"] for row in rows} == {SET}


def test_notes_are_in_words(graded):
    notes = {(row["student"], row["problem"]): row["note"] for row in graded[1]}
    assert notes["bob", "p1"] == "messages is not written yet"
    assert notes["library", "p3"] == "refine is not defined: did its cell fail?"
    assert notes["ada", "total"] == ""


@pytest.mark.filterwarnings("ignore:Object of type:RuntimeWarning")  # nbgrader misuses SQLAlchemy, harmlessly
def test_points_given_by_hand_stay_and_are_asked_for_again_only_when_the_answer_has_changed(course, tmp_path):
    from nbgrader.api import Gradebook

    from minisaobp.course import kit
    from minisaobp.course.process import Limits

    name, database = "set4_gtd", f"sqlite:///{tmp_path / 'gradebook.db'}"
    for kind in ("source", "release"):
        shutil.copytree(course / kind / name, tmp_path / kind / name)
    shutil.copy(course / "gradebook.db", tmp_path)
    handed_in = wrong.with_answer(nbformat.read(tmp_path / "source" / name / f"{name}.ipynb", 4), "p5", "")

    def grade(nb):
        folder = tmp_path / "submitted" / "Zoë Müller" / name
        folder.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, folder / f"{name}.ipynb")
        assert not kit.grade(tmp_path, Limits(), print)[1]
        with open(tmp_path / "grades.csv", newline="") as file:
            rows = {row["problem"]: (row["score"], row["note"]) for row in csv.DictReader(file)}
        page = (tmp_path / "feedback" / "Zoë Müller" / name / f"{name}.html").read_text()
        with Gradebook(database) as gradebook:
            asked = [g.name for g in gradebook.find_submission(name, "Zoë Müller").notebooks[0].grades
                     if g.needs_manual_grade]  # fmt: skip
        return rows["p5"], rows["total"], asked, page

    p5, total, asked, page = grade(handed_in)
    assert p5 == ("", "to be graded by hand") and total == ("24", "without what is to be graded by hand")
    assert asked == ["p5-written"] and "Not graded yet" in page

    with Gradebook(database) as gradebook:  # what the formgrader does
        given = gradebook.find_grade("p5-written", name, name, "Zoë Müller")
        given.manual_score, given.needs_manual_grade = 9.5, False
        gradebook.find_comment("p5-written", name, name, "Zoë Müller").manual_comment = "Where is the spread?"
        gradebook.db.commit()
    p5, total, asked, page = grade(handed_in)
    assert (p5, total, asked) == (("9.5", ""), ("33.5", ""), [])
    assert "Where is the spread?" in page and "9.5 / 12.0" in page and "Not graded yet" not in page

    wrong.by_identity(handed_in)["p5-written"].source += "\n\nA better conclusion."
    for _ in range(2):  # also when it is graded once more
        p5, total, asked, _ = grade(handed_in)
        assert p5[0] == "9.5" and total[0] == "33.5" and asked == ["p5-written"]
        assert all("handed in anew since it was graded by hand" in note for _, note in (p5, total))


def test_feedback_tells_no_hidden_test(graded, course, notebooks):
    from minisaobp.course.kit import secret_lines

    tests = copy.deepcopy(notebooks[SET][0])
    for cell in tests.cells:
        if cell.metadata.nbgrader.solution:
            cell.source = ""
    secrets = secret_lines(tests)
    assert len(secrets) > 10
    for student, nb in handed_in(*notebooks[SET]).items():
        own = "\n".join(cell.source for cell in nb.cells) if student == "library" else ""
        page = unescape((course / "feedback" / student / SET / f"{SET}.html").read_text())
        assert "Problem 1" in page and "BEGIN HIDDEN" not in page
        text = "".join(part.partition(">")[2] for part in page.split("<"))  # without the colours of the code
        assert not [line for line in secrets if line in text and line not in own], student

    page = (course / "feedback" / "thief" / SET / f"{SET}.html").read_text()
    helpers = {}
    exec(notebooks[SET][0].cells[1].source, helpers)
    asked = [str(float(helpers["attention"](L, seed)[0, 0])) for L, seed in ((5, 1), (3, 12))]
    assert "(3, 0.7, 12)" in str(secrets)  # what p1-c asks for
    assert [number in page for number in asked] == [True, False]  # a visible test's, a hidden one's
    assert "Hidden test: messages raised ValueError" in page and "Hidden test: messages raised ValueError:" not in page
    assert "FileNotFoundError" in page  # nothing was left for the cell behind


def test_the_release_has_no_solution_and_no_hidden_test(course, notebooks):
    from minisaobp.course.kit import secret_lines

    for name, (source, release) in notebooks.items():
        secrets = secret_lines(source)
        assert len(secrets) > 30
        text = (course / "release" / name / f"{name}.ipynb").read_text()
        lines = {line.strip() for cell in release.cells for line in cell.source.split("\n")}
        assert not secrets & lines
        assert not any(mark in text for mark in ("BEGIN SOLUTION", "END SOLUTION", "BEGIN HIDDEN", "END HIDDEN"))
        assert not any(cell.get("outputs") for cell in release.cells)
        stubs = [c for c in release.cells if c.cell_type == "code" and c.metadata.nbgrader.solution]
        assert all("NotImplementedError" in cell.source for cell in stubs)
    assert sorted(os.listdir(course / "release")) == sorted(wrong.SETS)


def test_a_line_of_a_solution_is_not_to_stand_in_a_visible_cell(notebooks):
    from minisaobp.course.kit import secret_lines

    source = copy.deepcopy(notebooks[SET][0])
    line = "m = A + np.exp(lam) * (A.sum(axis=-1, keepdims=True) - A)"
    assert line in wrong.by_identity(source)["p3-answer"].source
    wrong.by_identity(source)["printed"].source += f"\n{line}"
    assert line in secret_lines(source)


def test_the_sets_explain_themselves(notebooks):
    for source, _ in notebooks.values():
        first = source.cells[0].source
        assert all(word in first for word in ("**You will know**", "**You need**", "**It takes**", "points"))
        points = sum(c.metadata.nbgrader.get("points", 0) for c in source.cells)
        assert f"{points} points" in first
        for cell in source.cells:
            assert cell.metadata.keys() == {"nbgrader"} and cell.metadata.nbgrader.schema_version == 3
            headings = [line for line in cell.source.split("\n") if line.startswith("## Problem")]
            for heading in headings:
                problem = "p" + heading.split()[2].rstrip(".")
                own = sum(c.metadata.nbgrader.get("points", 0) for c in source.cells
                          if c.metadata.nbgrader.grade_id.startswith(problem + "-"))  # fmt: skip
                assert f"({own} points" in heading
        helpers = source.cells[1].source.partition("def close")[0]
        assert helpers == next(iter(notebooks.values()))[0].cells[1].source.partition("def close")[0]


def test_the_solution_of_a_set_must_score_full_marks(graded, course, tmp_path):
    for kind in ("source", "release", "submitted"):
        shutil.copytree(course / kind, tmp_path / kind)
    shutil.copy(course / "gradebook.db", tmp_path)
    path = tmp_path / "source" / SET / f"{SET}.ipynb"
    before = json.loads(path.read_text())
    for old, new, words in (
        ("import numpy as np", "import numpy as np\\nimport a_missing_package", "No module named 'a_missing_package'"),
        ("if i != j", "if True", "the solutions themselves fail p2-a, p2-c"),
    ):
        path.write_text(json.dumps(before).replace(old, new, 1))
        for command in (("grade", tmp_path), ("build", tmp_path / "new", "--source", tmp_path / "source")):
            done = course_command(*command)
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
            assert words in done.stderr and "nothing was graded" in done.stderr
    assert not (tmp_path / "grades.csv").exists() and not (tmp_path / "new" / "release").exists()


def test_what_a_teacher_changed_is_not_overwritten(course, tmp_path):
    shutil.copytree(course / "source" / SET, tmp_path / "source" / SET)
    path = tmp_path / "source" / SET / f"{SET}.ipynb"
    changed = path.read_text().replace("(3, 0.7, 12)", "(4, 0.7, 12)")
    path.write_text(changed)
    done = course_command("build", tmp_path)
    assert done.returncode == 2 and f"build from it (--source {tmp_path / 'source'})" in done.stderr
    assert path.read_text() == changed and not (tmp_path / "release").exists()
    settings = tmp_path / "nbgrader_config.py"
    settings.write_text("# the teacher's own\n")
    done = course_command("build", tmp_path, "--source", tmp_path / "source")
    assert done.returncode == 0 and f"{SET}: 40 points" in done.stdout and path.read_text() == changed
    assert settings.read_text() == "# the teacher's own\n"


def test_nbgraders_own_command_runs_a_submission_apart_too(course, notebooks, tmp_path):
    from nbgrader.api import Gradebook

    for kind in ("source", "release"):
        shutil.copytree(course / kind / SET, tmp_path / kind / SET)
    for file in ("nbgrader_config.py", "gradebook.db"):
        shutil.copy(course / file, tmp_path)
    (tmp_path / "submitted" / "forger" / SET).mkdir(parents=True)
    nbformat.write(handed_in(*notebooks[SET])["forger"], tmp_path / "submitted" / "forger" / SET / f"{SET}.ipynb")
    command = [sys.executable, "-m", "nbgrader", "autograde", SET, "--create"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0, done.stderr
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as gradebook:
        assert gradebook.find_submission(SET, "forger").score == 33


# notebooks/course/README.md, "Another question": set 2 with BP-Low in place of BP-High
ANOTHER_QUESTION = [
    ("np.exp(lam)", "np.exp(-lam)"),
    ("np.expm1(-lam)", "np.expm1(lam)"),
    ("bp_high(lam, L)", "bp_high(-lam, L)"),
    ("ms.algorithm1(A, lam)", "ms.algorithm1(A, -lam)"),
    ("ms.refine(A, lam", "ms.refine(A, -lam"),
    ("EXAMPLE + 1", "1 - EXAMPLE / 2"),
    ("[[1.2, 1.8], [1.4, 1.6]]", "SWAP"),
    ("[[0.9, 0.6], [0.8, 0.7]]", "[[1.2, 1.8], [1.4, 1.6]]"),
    ("SWAP", "[[0.9, 0.6], [0.8, 0.7]]"),
    ("[[7 / 9, 2 / 9], [1 / 2, 1 / 2]]", "SWAP"),
    ("[[32 / 39, 7 / 39], [9 / 13, 4 / 13]]", "[[7 / 9, 2 / 9], [1 / 2, 1 / 2]]"),
    ("SWAP", "[[32 / 39, 7 / 39], [9 / 13, 4 / 13]]"),
    ("[[0.7, 0.3], [7 / 15, 8 / 15]]", "[[48 / 55, 7 / 55], [18 / 25, 7 / 25]]"),
    ("[18 / 35, 17 / 35, 0", "[12 / 25, 13 / 25, 0"),
    ("[0.24, 0.36, 0.4", "[6 / 35, 9 / 35, 4 / 7"),
]


def test_another_question_is_not_answered_by_last_years_solutions(notebooks):
    from minisaobp.course import kit
    from minisaobp.course.process import Limits

    old = notebooks[SET][0]
    new = copy.deepcopy(old)
    for before, after in ANOTHER_QUESTION:
        assert any(before in cell.source for cell in new.cells), before
        for cell in new.cells:
            if cell.cell_type == "code":
                cell.source = cell.source.replace(before, after)
    kit.check_solved(new, Limits(seconds=60), SET)
    assert sum(score for score, _ in kit.graded(old, new, new, Limits(seconds=60)).values()) == 5


def test_an_interrupted_build_releases_nothing_unchecked(course, tmp_path, monkeypatch):
    from minisaobp.course import kit
    from minisaobp.course.process import Limits

    shutil.copytree(course / "source" / SET, tmp_path / "sets" / SET)

    (tmp_path / "new").mkdir()

    def interrupted(source, release, *_):
        assert release.cells
        raise KeyboardInterrupt

    monkeypatch.setattr(kit, "check_empty", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kit.build(tmp_path / "new", Limits(), print, tmp_path / "sets")
    assert not list((tmp_path / "new" / "release").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grade", "nowhere"], "no release/SET/SET.ipynb there; `course build` makes it"),
        (["build", "file"], "expected a folder that can be written, got 'file'"),
        (["build", "new", "--source", "."], "no problem set there"),
        (["build", "new", "--seconds", "0"], "--seconds: expected a number from 0.1 to 3600, got '0'"),
        (["build", "new", "--user", "nobody-of-that-name"], "--user: no account 'nobody-of-that-name' on this machine"),
        (["grade", "new", "--source", "."], "--source: of build alone"),
        (["mark", "new"], "invalid choice"),
    ],
)
def test_bad_input_is_one_line(course, tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    done = course_command(*arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_without_nbgrader_it_says_what_to_install():
    code = "import sys; sys.modules['nbgrader'] = None; from minisaobp.cli import main; main(['course', 'build', 'x'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "not installed: pip install -e .[course]" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not os.path.exists("x")
