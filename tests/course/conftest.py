"""The course, built once for all tests; skipped where nbgrader is not installed."""

import pytest

from tests.course import wrong


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e .[course]")
    from minisaobp.course import kit
    from minisaobp.course.process import Limits

    course = tmp_path_factory.mktemp("course")
    kit.build(course, Limits(seconds=60), print)
    return course


@pytest.fixture(scope="session")
def notebooks(course):
    """{set: (teacher's, students')}"""
    from minisaobp.course.grader import read

    kinds = ("source", "release")
    return {name: tuple(read(course / kind / name / f"{name}.ipynb") for kind in kinds) for name in wrong.SETS}
