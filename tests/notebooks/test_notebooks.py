"""The committed notebooks: their form, and that they hold outputs that read on the web. Nothing is executed here."""

import re

import nbformat
import pytest

from tests.notebooks.outputs import NOTEBOOKS, SKIPPED, differences, is_skipped, printed

TITLES = [path.stem for path in NOTEBOOKS]
MACHINE = re.compile(r"(?<![\w.])(?:/(?:home|Users|root|tmp|usr|opt|var|work|mnt)/|[A-Z]:\\)\S*")


def notebook(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def test_the_series_is_numbered_from_1():
    assert [title[:2] for title in TITLES] == [f"{n:02}" for n in range(1, len(TITLES) + 1)]
    readme = (NOTEBOOKS[0].parents[1] / "README.md").read_text(encoding="utf-8")
    assert [title for title in TITLES if f"(notebooks/{title}.ipynb)" not in readme] == []


def test_the_readme_has_the_verdicts_of_the_replication():
    nb = notebook(next(path for path in NOTEBOOKS if path.stem == "10_replication"))
    rows = [line for line in printed(code_cells(nb)[-1]).splitlines() if line.startswith("|")]
    readme = (NOTEBOOKS[0].parents[1] / "README.md").read_text(encoding="utf-8")
    assert len(rows) > 10 and "\n".join(rows) in readme


@pytest.mark.parametrize("path", NOTEBOOKS, ids=TITLES)
def test_opens_with_what_it_is_for_and_ends_with_three_exercises(path):
    cells = notebook(path).cells
    first, last = cells[0].source, cells[-1].source
    assert first.startswith(f"# {int(path.stem[:2])}. ")
    assert re.findall(r"^\*\*(.+?)\*\*", first, re.MULTILINE) == ["You will know", "You need", "It runs"]
    _, heading, exercises = last.rpartition("## ")
    assert heading and exercises.startswith("Exercises\n")
    assert re.findall(r"^(\d+)\. ", exercises, re.MULTILINE) == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=TITLES)
def test_was_executed_once_from_top_to_bottom_without_a_word_of_complaint(path):
    cells = [cell for cell in code_cells(notebook(path)) if not is_skipped(cell)]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any(printed(cell) for cell in cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=TITLES)
def test_asserts_what_it_says(path):
    code = "\n".join(cell.source for cell in code_cells(notebook(path)))
    assert len(re.findall(r"assert_allclose\(", code)) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=TITLES)
def test_holds_nothing_of_the_machine_it_was_made_on(path):
    nb = notebook(path)
    assert nb.metadata.kernelspec.name == "python3"
    assert ("tolerance" in nb.metadata.get("minisaobp", {})) == ("reason" in nb.metadata.get("minisaobp", {}))
    assert "widgets" not in nb.metadata  # the state of a widget: large, and dead on the web
    for n, cell in enumerate(nb.cells):
        assert set(cell.metadata) <= {"tags"}, f"cell {n}: metadata {dict(cell.metadata)}"
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), f"cell {n}"
        for text in (cell.source, printed(cell)):
            assert not MACHINE.findall(text), f"cell {n}"
        assert not (is_skipped(cell) and cell.outputs), f"cell {n}: tagged {SKIPPED}, so it has no output"


@pytest.mark.parametrize(
    ("was", "now", "same"),
    [
        ("entropy 3.14 nats", "entropy 3.15 nats", True),  # one unit of the last digit
        ("entropy 3.14 nats", "entropy 3.16 nats", False),
        ("entropy 3.14 nats", "entropy  3.14 nats", True),  # columns may shift
        ("entropy 3.14 nats", "perplexity 3.14 nats", False),
        ("entropy 3.14 nats", "entropy -3.14 nats", False),
        ("entropy 3.14 nats", "entropy nan nats", False),
        ("error 3.1e-17", "error 8.2e-16", True),  # both are rounding
        ("error 3.1e-17", "error 3.1e-07", False),
        ("error 3.1e-07", "error 3.2e-07", True),
        ("12 heads", "13 heads", False),
        ("up in 40%", "up in 41%", False),
        ("4,096 tokens", "4,097 tokens", False),
        ("[1.00 inf]", "[1.00 inf]", True),
        ("[1.00 inf]", "[1.00 2.00]", False),
    ],
)
def test_a_changed_number_is_a_difference(was, now, same):
    assert bool(differences(was, now, 0)) != same


def test_a_tolerance_is_relative_and_for_fractions_only():
    assert differences("loss 5.000, 4 layers", "loss 5.040, 4 layers", 0)
    assert not differences("loss 5.000, 4 layers", "loss 5.040, 4 layers", 0.01)
    assert differences("loss 5.000, 4 layers", "loss 5.000, 5 layers", 0.5)
