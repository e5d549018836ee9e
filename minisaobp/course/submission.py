"""What a student hands in, put back into the form that was handed out.

Students delete cells, copy them, and edit what is locked. nbgrader then loses points or gives up: a copied cell has its
identity twice. So the notebook to be graded is made anew from the one that was handed out, and only what is the
student's is taken from the submission: the answers, and cells of their own.
"""

import copy

BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"
BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"


def _about(cell, key):
    about = cell.metadata.get("nbgrader", {})
    return about.get(key, False) if isinstance(about, dict) else False


def is_solution(cell):
    return bool(_about(cell, "solution"))


def is_test(cell):
    return bool(_about(cell, "grade")) and not is_solution(cell)


def is_manual(cell):
    return bool(_about(cell, "grade")) and is_solution(cell)


def is_setup(cell):
    return cell.cell_type == "code" and bool(_about(cell, "locked")) and not is_test(cell) and not is_solution(cell)


def restored(submitted, released):
    """A notebook with the cells that were handed out, the student's answers in them, and the student's own cells.

    submitted, released: notebooks. Returns the notebook and a list of what had to be put right, in words.
    A cell that lost what nbgrader wrote into it (some editors throw it away) is known by its id.
    A cell of the student's own keeps its place behind the handed-out cell that it stands behind. Of several copies of
    an answer, the first that was changed counts as the answer; the others stay as cells of the student's own.
    """
    known = {_about(cell, "grade_id"): cell for cell in released.cells if _about(cell, "grade_id")}
    by_id = {cell.get("id"): identity for identity, cell in known.items()}
    texts = {cell.source for cell in released.cells}
    copies, own, said, behind = {}, {None: []}, [], None
    for cell in submitted.cells:
        cell.source = cell.source.encode(errors="replace").decode()  # without halves of characters, which no file holds
        cell.source = cell.source.replace("\r\n", "\n")
        identity = _about(cell, "grade_id") or by_id.get(cell.get("id"))
        identity = identity if isinstance(identity, str) and identity in known else None
        if identity:
            behind = identity
            copies.setdefault(identity, []).append(cell)
        elif cell.source not in texts or cell.cell_type == "code":
            own.setdefault(behind, []).append(_plain(cell))
    result = copy.deepcopy(released)
    result.cells = list(own[None])
    for cell in released.cells:
        identity = _about(cell, "grade_id")
        new = copy.deepcopy(cell)
        result.cells.append(new)
        if not identity:
            continue
        found = copies.get(identity, [])
        if not found:
            said.append(f"cell {identity} was deleted: put back as it was handed out")
        if is_solution(cell):
            chosen = next((c for c in found if c.source != cell.source), found[0] if found else cell)
            new.source = chosen.source
            if len(found) > 1:
                said.append(f"cell {identity} is there {len(found)} times: the first changed one counts")
                others = [c for c in found if c is not chosen and c.source != cell.source]
                own.setdefault(identity, [])[:0] = [_plain(c) for c in others if c.cell_type == cell.cell_type]
        elif any(c.source != cell.source for c in found):
            said.append(f"cell {identity} was changed: the original counts")
        elif len(found) > 1:
            said.append(f"cell {identity} is there {len(found)} times: the original counts")
        result.cells += own.get(identity, [])
    for number, cell in enumerate(result.cells, 1):
        cell["id"] = f"cell-{number:03}"
    return result, said


def _plain(cell):
    """A cell without anything that nbgrader reads."""
    cell = copy.deepcopy(cell)
    cell.metadata = type(cell.metadata)()
    return cell


def without_hidden(source):
    """A test cell as a student sees it."""
    kept, hidden = [], False
    for line in source.split("\n"):
        if BEGIN_HIDDEN in line:
            hidden = True
        elif END_HIDDEN in line:
            hidden = False
        elif not hidden:
            kept.append(line)
    return "\n".join(kept)
