"""The three places where nbgrader is made to use `submission` and `grader`; nbgrader_config.py names them."""

from pathlib import Path

from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Float, Integer, Unicode

from .grader import Limits, defined_names, execute, read
from .submission import is_test, restored, without_hidden


def _original(preprocessor, resources, kind):
    """The notebook that was handed out (kind "release"), or the teacher's ("source")."""
    about = resources["nbgrader"]
    course = preprocessor.parent.parent.coursedir  # exporter, converter
    folder = course.format_path(getattr(course, f"{kind}_directory"), ".", about["assignment"])
    return read(Path(folder) / f"{about['notebook']}.ipynb")


class Restore(NbGraderPreprocessor):
    """Instead of nbgrader's DeduplicateIds: a copied, deleted or tampered cell costs nobody a point."""

    def preprocess(self, nb, resources):
        nb, said = restored(nb, _original(self, resources, "release"))
        for line in said:
            self.log.warning("%s: %s", resources["nbgrader"]["student"], line)
        return nb, resources


class ExecuteApart(NbGraderPreprocessor):
    """Instead of nbgrader's Execute, which runs tests and answers in one process."""

    seconds = Float(Limits().seconds, help="a cell may take").tag(config=True)
    megabytes = Integer(Limits().megabytes, help="address space of a student's process").tag(config=True)
    user = Unicode("", help="runs the student's code, if root grades").tag(config=True)

    def preprocess(self, nb, resources):
        names = defined_names(_original(self, resources, "source"))
        execute(nb, names, Limits(self.seconds, self.megabytes, self.user or None))
        return nb, resources


class HideTests(NbGraderPreprocessor):
    """What a student gets to read has no hidden test in it."""

    def preprocess(self, nb, resources):
        for cell in nb.cells:
            if is_test(cell):
                cell.source = without_hidden(cell.source)
        return nb, resources
