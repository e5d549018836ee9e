"""Every wrong submission loses points on its problem and on no other; about 200 of them, in six processes."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e .[course]")

from minisaobp.course import kit
from minisaobp.course.grader import read, scores
from minisaobp.course.process import Limits
from tests.course import wrong

LIMITS, SHORT = Limits(seconds=60), Limits(seconds=4)  # enough for a busy machine; as much as an endless loop gets


@pytest.fixture(scope="session")
def graded(notebooks):
    """{(set, problem, what is wrong): {grade_id: (score, points)}}"""
    with ProcessPoolExecutor(6, multiprocessing.get_context("spawn")) as pool:
        jobs = {}
        for name, (source, release) in notebooks.items():
            for (problem, what), nb in wrong.submissions(name, source).items():
                limits = SHORT if what == "endless loop" else LIMITS
                jobs[name, problem, what] = pool.submit(kit.graded, nb, source, release, limits)
            for what, nb in wrong.worthless(name, source).items():
                jobs[name, "all", what] = pool.submit(kit.graded, nb, source, release, LIMITS)
        return {key: job.result() for key, job in jobs.items()}


def test_every_set_is_here():
    assert kit.set_names(kit.SOURCE) == sorted(wrong.SETS)
    for name in wrong.SETS:
        cells = scores(read(kit.SOURCE / name / f"{name}.ipynb"))
        problems = {cell.partition("-")[0] for cell, (score, _) in cells.items() if score is not None}
        assert problems == wrong.SETS[name].keys()


@pytest.mark.parametrize(("name", "problem"), [(name, p) for name, problems in wrong.SETS.items() for p in problems])
def test_a_wrong_answer_loses_points_on_its_problem_alone(graded, name, problem):
    mine = {what: found for (n, p, what), found in graded.items() if (n, p) == (name, problem)}
    assert len(mine) >= 6
    for what, found in mine.items():
        own = [(score, points) for cell, (score, points) in found.items() if cell.startswith(f"{problem}-")]
        others = [(score, points) for cell, (score, points) in found.items() if not cell.startswith(f"{problem}-")]
        assert sum(score for score, _ in own) < sum(points for _, points in own), what
        assert all(score == points for score, points in others if score is not None), what


@pytest.mark.parametrize("name", wrong.SETS)
def test_what_knows_nothing_of_a_problem_scores_nothing(graded, name):
    mine = {what: found for (n, problem, what), found in graded.items() if (n, problem) == (name, "all")}
    assert len(mine) >= len(wrong.TRIVIAL)
    for what, found in mine.items():
        assert not {cell: score for cell, (score, _) in found.items() if score}, what


def test_partial_credit(graded):
    """An answer that is right for the example alone has some of the points of its problem."""
    for (name, problem, what), found in graded.items():
        if what == "one size" and (name, problem) != ("set4_gtd", "p4"):  # p4-a and p4-b ask for one size
            own = {cell: score for cell, (score, _) in found.items() if cell.startswith(f"{problem}-")}
            assert own[f"{problem}-a"] and not own[f"{problem}-c"], (name, problem)
