"""Execute a copy of every notebook and compare what it prints with the committed outputs; minutes, so on request only:

    python -m pytest tests/notebooks/execute.py                              -k 03 for one of them
    python -m pytest tests/notebooks/execute.py --overwrite                  write the outputs into the notebooks

Numbers may differ as `outputs.differences` says. A notebook whose numbers come from float32 training names a tolerance
of its own in its metadata; one that is trained on Python's documentation, which is another text in each Python, names
the Python of its outputs, and on any other its assertions alone count:

    "minisaobp": {"tolerance": 0.01, "reason": "float32 training", "text": "Python 3.11.7"}
"""

import platform
from pathlib import Path

import nbformat
import pytest
from nbmake.nb_run import NotebookRun

from tests.notebooks.outputs import NOTEBOOKS, differences, is_skipped, printed

ROOT = Path(__file__).parents[2]
CELL_SECONDS = 600  # far above what any takes alone: a busy machine is no fault of the notebook
STRICT = "import warnings\n\nwarnings.filterwarnings('error', module='minisaobp')"  # other code's go to stderr


@pytest.fixture(autouse=True)
def kernel_environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # a copy does not lie beside the package
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own, which draws into the notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prints_what_is_committed(path, tmp_path, pytestconfig):
    committed = nbformat.read(path, as_version=4)
    copy = nbformat.from_dict(committed)
    for cell in copy.cells:
        cell.metadata.pop("tags", None)  # here the sliders are made as well, though nobody moves them
    copy.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    nbformat.write(copy, tmp_path / path.name)
    result = NotebookRun(tmp_path / path.name, CELL_SECONDS).execute()

    if result.error:
        pytest.fail(result.error.trace, pytrace=False)
    cells = zip(committed.cells, result.nb.cells[1:], strict=True)
    pairs = [(was, now) for was, now in cells if was.cell_type == "code"]
    complaints = [output.text for _, now in pairs for output in now.outputs if output.get("name") == "stderr"]
    if complaints:
        pytest.fail("on stderr:\n" + "".join(complaints), pytrace=False)

    own = committed.metadata.get("minisaobp", {})
    this = f"Python {platform.python_version()}"
    if pytestconfig.getoption("overwrite"):
        if "text" in own:
            own["text"] = this
        count = 0
        for was, now in pairs:
            count += not is_skipped(was)
            was.outputs, was.execution_count = ([], None) if is_skipped(was) else (_joined(now.outputs), count)
            for output in was.outputs:
                if "execution_count" in output:
                    output.execution_count = count
        nbformat.write(committed, path)
        return
    if own.get("text", this) != this:
        pytest.skip(f"executed without complaint; its numbers are those of the documentation of {own['text']}")
    found = []
    for was, now in pairs:
        if not is_skipped(was):
            found += differences(printed(was), printed(now), own.get("tolerance", 0))
            assert _kinds(was) == _kinds(now), f"kinds of outputs: {_kinds(was)} committed, {_kinds(now)} now"
    if found:
        pytest.fail("\n".join(found), pytrace=False)


def _joined(outputs):
    """Outputs with neighbouring prints as one: where a print is cut in pieces is chance."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _kinds(cell):
    """Which kinds of output a cell has: prints and pictures."""
    return {kind for output in cell.outputs for kind in output.get("data", {"stdout": None})}
