"""What a student hands in, put back into form: nothing of nbgrader is needed for it."""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from minisaobp.course.grader import defined_names, execute, scores
from minisaobp.course.process import CannotGrade, Limits
from minisaobp.course.submission import restored, without_hidden

TEST = """assert twice(2) == 4, 'twice 2 is 4'
### BEGIN HIDDEN TESTS
assert twice(3) == 6, 'other: 3'
### END HIDDEN TESTS"""
LIMITS = Limits(seconds=30)


def cell(identity, source, new=new_code_cell, **about):
    about = {"grade": False, "solution": False, "locked": True, "schema_version": 3, "task": False} | about
    return new(source, metadata={"nbgrader": about | {"grade_id": identity}})


@pytest.fixture
def handed_out():
    return new_notebook(
        cells=[
            cell("text", "A text", new_markdown_cell),
            cell("setup", "import numpy as np"),
            cell("p1-answer", "def twice(x):\n    raise NotImplementedError()", solution=True, locked=False),
            cell("p1-a", TEST, grade=True, points=2),
            cell(
                "p2-written", "YOUR ANSWER HERE", new_markdown_cell, grade=True, solution=True, locked=False, points=3
            ),
        ]
    )


@pytest.fixture
def handed_in(handed_out):
    nb = copy.deepcopy(handed_out)
    nb.cells[2].source = "def twice(x):\n    return x + x"
    return nb


def sources(nb):
    return [c.source for c in nb.cells]


def test_an_untouched_form_stays(handed_in, handed_out):
    nb, said = restored(handed_in, handed_out)
    assert said == [] and sources(nb) == sources(handed_in)
    nbformat.validate(nb)


def test_own_cells_stay_behind_theirs(handed_in, handed_out):
    handed_in.cells.insert(3, new_code_cell("twice(21)"))
    handed_in.cells.insert(0, new_markdown_cell("My name"))
    nb, said = restored(handed_in, handed_out)
    assert said == [] and sources(nb)[0] == "My name" and sources(nb)[4] == "twice(21)"


def test_a_copied_answer_counts_once(handed_in, handed_out):
    for place in (2, 3):  # the untouched copy before, or behind
        nb = copy.deepcopy(handed_in)
        nb.cells.insert(place, copy.deepcopy(handed_out.cells[2]))
        nb, said = restored(nb, handed_out)
        assert sources(nb) == sources(handed_in) and said == [
            "cell p1-answer is there 2 times: the first changed one counts"
        ]


def test_deleted_and_changed_cells_are_put_back(handed_in, handed_out):
    handed_in.cells[3].source = "assert True"
    handed_in.cells[3].metadata.nbgrader.update(points=1000, grade=False, solution=True)
    handed_in.cells[1].metadata.nbgrader, handed_in.cells[1].id = "nonsense", "new"
    del handed_in.cells[4]
    nb, said = restored(handed_in, handed_out)
    assert nb.cells[-2].source == TEST and nb.cells[-2].metadata == handed_out.cells[3].metadata
    assert said == [
        "cell setup was deleted: put back as it was handed out",
        "cell p1-a was changed: the original counts",
        "cell p2-written was deleted: put back as it was handed out",
    ]


def test_what_editors_do_to_a_notebook(handed_in, handed_out):
    for each in handed_in.cells:
        each.metadata = {"colab": {"base_uri": "x"}, "collapsed": False, "tags": ["a"]}
        each.source = each.source.replace("\n", "\r\n")
    handed_in.metadata.kernelspec = {"name": "conda-env-mine", "display_name": "mine", "language": "python"}
    handed_in.cells[2:2] = [new_code_cell("import math"), new_markdown_cell("My way")]
    nb, said = restored(handed_in, handed_out)
    assert said == [] and nb.metadata == handed_out.metadata
    assert [s for s in sources(nb) if s not in ("import math", "My way")] == [
        c.source.replace("\r\n", "\n") for c in handed_in.cells if c.metadata.get("colab")
    ]
    assert graded(nb) == ([], {"p1-a": (2, 2), "p2-written": (None, 3)})


def test_a_test_without_its_hidden_part():
    assert without_hidden(TEST) == "assert twice(2) == 4, 'twice 2 is 4'"


def solved():
    return new_notebook(cells=[cell("p1-answer", "def twice(x):\n    return 2 * x", solution=True)])


def graded(nb, limits=LIMITS):
    execute(nb, solved(), limits)
    return nb.cells[-2].outputs, scores(nb)


def test_grading_without_nbgrader(handed_in):
    assert defined_names(handed_in.cells[2]) == {"twice"}
    assert graded(handed_in) == ([], {"p1-a": (2, 2), "p2-written": (None, 3)})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("def twice(x):\n    return 5", "Test: twice 2 is 4"),
        ("def twice(x):\n    return 4", "Hidden test: other"),  # not what stands behind the colon
        ("def twice(x):\n    return 4 if x == 2 else 1 / 0", "Hidden test: twice raised ZeroDivisionError"),
        ("def twice(x):\n    return 4 if x == 2 else secret(x)", "Hidden test: twice raised NameError"),
        ("def twice(x):\n    raise type(f'x = {x}', (Exception,), {})", "Test: twice raised an exception of its own"),
        ("def twice(x):\n    import sys\n    sys.exit(0)", "Test: twice raised SystemExit: 0"),
        ("def twice(x):\n    import os\n    os._exit(0)", "Test: the call ended the whole process"),
        ("def twice(x):\n    raise NotImplementedError", "Test: twice is not written yet"),
        ("def twice(x):\n    class Always(int):\n        __eq__ = lambda *_: True\n    return Always()",
         "Test: twice returned what is no answer: expected numbers, arrays or text, got Always"),
        ("def twice(x):\n    return np.array([None])", "Test: twice returned what is no answer: expected an array"),
        ("def twice(x):\n    import minisaobp", "Test: twice raised"),
        ("def twice(x):\n    return np.ones((40_000, 40_000))", "Test: twice raised"),  # 12.8 GB
        ("def twice(x):\n    return bytearray(2**33)", "Test: twice raised MemoryError"),
        ("twice = 4", "Test: the answer is not of the form asked for: TypeError"),
        ("import os\nos._exit(0)", "Test: twice is not defined"),
        ("def twice(x) return 4", "Test: twice is not defined"),
    ],
)  # fmt: skip
def test_wrong_answers_in_words(handed_in, answer, words):
    handed_in.cells[2].source = answer
    outputs, points = graded(handed_in)
    line = outputs[-1].traceback[0]
    assert line == words if words.startswith("Hidden") else line.startswith(words)  # all that a hidden test says
    assert points["p1-a"] == (0, 2)


def test_endless_loops(handed_in):
    handed_in.cells.insert(1, new_code_cell("while True: pass"))
    handed_in.cells.insert(
        1, new_code_cell("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
    )
    outputs, points = graded(handed_in, Limits(seconds=1.5))
    assert "longer than 1.5 seconds" in str(handed_in.cells[1].outputs) and outputs == [] and points["p1-a"] == (2, 2)
    handed_in.cells[4].source = "def twice(x):\n    while True: pass"
    outputs, points = graded(handed_in, Limits(seconds=1.5))
    assert "is there a loop that never ends?" in outputs[0].evalue and points["p1-a"] == (0, 2)


def test_no_cell_learns_what_a_test_asks(handed_in):
    remember = "seen.append(x)\n    open('seen', 'a').write(f'{x} ')\n    print(x)"
    handed_in.cells[2].source = f"seen = []\n\n\ndef twice(x):\n    {remember}\n    return 2 * x"
    handed_in.cells.append(new_code_cell("import os\nprint(seen, os.path.exists('seen'))"))
    execute(handed_in, solved(), LIMITS)
    assert handed_in.cells[-1].outputs[0].text == "[] False\n" and scores(handed_in)["p1-a"] == (2, 2)


def test_a_missing_package_is_nobodys_zero(handed_in):
    handed_in.cells[1].source = "import a_package_that_is_missing"
    with pytest.raises(CannotGrade, match="No module named 'a_package_that_is_missing'"):
        graded(handed_in)
    handed_in.cells[1].source = "import numpy as np"
    handed_in.cells[3].source = "### BEGIN HIDDEN TESTS\nimport a_package_that_is_missing\n### END HIDDEN TESTS"
    with pytest.raises(CannotGrade, match="a_package_that_is_missing"):
        graded(handed_in)


def test_pictures_and_magics_of_a_cell(handed_in):
    handed_in.cells[1].source = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    handed_in.cells[1].metadata = {}
    execute(handed_in, solved(), LIMITS)
    assert [o.output_type for o in handed_in.cells[1].outputs][-1] == "display_data", handed_in.cells[1].outputs


def test_who_builds_on_a_mistake_pays_for_it_once(handed_in):
    half = "def half(x):\n    return 0.5 * twice(x) / 2"
    about = {"grade": True, "points": 3}
    handed_in.cells[4:4] = [
        cell("p2-answer", half, solution=True),
        cell("p2-a", "assert half(8) == 4, 'half of 8 is 4'", **about),
        cell("p2-b", "### BEGIN HIDDEN TESTS\nassert half(7) == 3.5\n### END HIDDEN TESTS", **about),
    ]
    teachers = solved()
    teachers.cells.append(cell("p2-answer", "def half(x):\n    return twice(x) / 4", solution=True))
    test = handed_in.cells[5]
    for answer, mine, points, words in (
        ("return x + x", half, (2, 3, 3), None),
        ("return 3 * x", half, (0, 3, 3), "with the right answers to earlier problems"),
        ("while True: pass", half, (0, 3, 3), "with the right answers to earlier problems"),
        ("return 3 * x", half.replace("twice(x) / 2", "twice(twice(x))"), (0, 0, 0), "half of 8 is 4"),
        (
            "return 3 * x",
            "def half(x):\n    raise ValueError(__import__('inspect').getsource(twice))",
            (0, 0, 0),
            "* x",
        ),
        ("return half(x)", "def half(x):\n    return x / 2", (0, 3, 3), None),  # nothing of a later problem
    ):
        handed_in.cells[2].source, handed_in.cells[4].source = f"def twice(x):\n    {answer}", mine
        execute(handed_in, teachers, Limits(seconds=2))
        found = scores(handed_in)
        assert tuple(found[name][0] for name in ("p1-a", "p2-a", "p2-b")) == points, (answer, mine)
        assert words in str(test.outputs) if words else test.outputs == []
        assert "2 * x" not in str(handed_in)  # the teacher's
