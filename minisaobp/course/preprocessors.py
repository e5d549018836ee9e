"""The four places where nbgrader is made to use `submission` and `grader`; `kit.configure` names them."""

from pathlib import Path

from nbgrader.preprocessors import GetGrades, NbGraderPreprocessor
from traitlets import Float, Integer, Unicode

from .grader import execute, read
from .process import Limits
from .submission import is_manual, is_test, restored, without_hidden


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
        source = _original(self, resources, "source")
        execute(nb, source, Limits(self.seconds, self.megabytes, self.user or None))
        return nb, resources


class ShowGrades(GetGrades):
    """As nbgrader's, which shows an answer that nobody has read yet as 0 points, without a word."""

    def preprocess_cell(self, cell, resources, cell_index):
        cell, resources = super().preprocess_cell(cell, resources, cell_index)
        if is_manual(cell):
            grade = self.gradebook.find_grade(
                cell.metadata.nbgrader.grade_id, self.notebook_id, self.assignment_id, self.student_id
            )
            if grade.auto_score is None and grade.manual_score is None:
                cell.metadata.nbgrader["comment"] = "Not graded yet: a person will read it, and the points will follow."
        return cell, resources


class HideTests(NbGraderPreprocessor):
    """What a student gets to read has no hidden test in it."""

    def preprocess(self, nb, resources):
        for cell in nb.cells:
            if is_test(cell):
                cell.source = without_hidden(cell.source)
        return nb, resources
