"""The verdict as a person reads it, and as JSON."""

import textwrap

import numpy as np

from .. import __version__

WIDTH = 100
VARIANT_NAMES = {"high": "BP-High", "low": "BP-Low", "elemmul": "BP-ElemMul", "original": "plain attention"}
MEASURE_NAMES = {
    "entropy": "attention entropy, Eq. 2",
    "gtd": "GTD, Eq. 13",
    "indirect_entropy": "indirect entropy, Eq. 14",
    "indirect_attention": "indirect attention, Eq. 12",
}


def report(verdict):
    """A few lines: what was asked, which reading it is, where it parts first, and last the summary for a CI's log."""
    asked, found = verdict.asked, verdict.explanation
    lines = [f"Crosscheck of {verdict.name}: {_what(asked)}", ""]
    if found.readings:
        lines += _readings(verdict)
    elif not verdict.passed:
        lines += _unexplained(verdict)
    first = next((o for o in verdict.outcomes if o.case.must and not o.passed), None)
    if first is not None:
        lines += ["", *_first(first)]
    lines += _others(verdict)
    lines += [f"Note: {note}" for note in verdict.notes]
    if lines[-1]:
        lines.append("")
    return "\n".join([*lines, summary(verdict)])


def summary(verdict):
    """The one line that a CI's log shows."""
    counts = {}
    for kind in ("must", "may"):
        outcomes = [o for o in verdict.outcomes if kind in o.case.flags]
        counts[kind] = f"{sum(o.passed for o in outcomes)}/{len(outcomes)}"
    found = verdict.explanation
    reading = ""
    if found.readings:
        names = [r.name for r in found.readings]
        reading = f": {' or '.join(names[: found.alternatives])}"
        reading += "".join(f" + {name}" for name in names[found.alternatives :])
    elif not verdict.passed:
        kinds = _kinds(verdict) - {"not asked"}
        reading = ": no known reading" if kinds & {"value", "shape"} else f": {', '.join(sorted(kinds))}"
    state = "PASSED" if verdict.passed else "FAILED"
    return (
        f"crosscheck {state}{reading} | must {counts['must']}, may {counts['may']} | "
        f"seed {verdict.asked['seed']}, {verdict.seconds:.1f} s"
    )


def record(verdict):
    """The same for `--json`: numbers, text, lists and dictionaries alone."""
    found = verdict.explanation
    return {
        "schema": 1,
        "name": verdict.name,
        "passed": verdict.passed,
        "summary": summary(verdict),
        "asked": verdict.asked,
        "readings": [{"name": r.name, "words": r.words, "paper": r.paper} for r in found.readings],
        "together": found.together,
        "facts": found.lines,
        "notes": verdict.notes,
        "seconds": round(verdict.seconds, 3),
        "minisaobp": __version__,
        "cases": [_case(o) for o in verdict.outcomes],
    }


def _case(o):
    row, column = (o.where[-2:] if o.where and len(o.where) >= 2 else (None, None)) if o.where else (None, None)
    lam = o.case.lam
    return {
        "id": o.case.id,
        "flags": list(o.case.flags),
        "passed": o.passed,
        "problem": o.problem,
        "L": o.case.L,
        "lambda": None if lam is None else np.asarray(lam).ravel().tolist() if np.ndim(lam) else float(lam),
        "dtype": o.case.dtype,
        "index": None if o.where is None else list(o.where),
        "row": row,
        "column": column,
        "expected": _number(o.expected, o.where),
        "got": _number((o.got or {}).get("output"), o.where),
        "largest_difference": o.error if np.isfinite(o.error) else None,
        "tolerance": o.tolerance or None,
    }


def _number(array, where):
    if where is None or array is None or np.ndim(array) != len(where):
        return None
    value = float(array[where])
    return value if np.isfinite(value) else None


def _what(asked):
    if asked["what"] != "refine":
        return f"{MEASURE_NAMES[asked['what']]}, {asked['arrays']}"
    parts = [VARIANT_NAMES[asked["variant"]], "causal" if asked["causal"] else "encoder", asked["arrays"]]
    return ", ".join(parts + ["with gradients"] * asked["gradients"])


def _readings(verdict):
    found, lines = verdict.explanation, []
    if found.together:
        lines.append("No known reading fits by itself; these two together do.")
    for n, reading in enumerate(found.readings):
        heading = "It is:" if n == 0 else "or:" if n < found.alternatives else "and:"
        lines += _wrapped(f"{heading} {reading.words}.", "  ")
        lines += _wrapped(f"Paper: {reading.paper}.", "  ", "  ")
    lines += [line for fact in found.lines for line in _wrapped(f"{_capital(fact)}.", "  ", "  ")]
    left = found.failing - found.explained
    if left > 0:
        lines.append(f"  {left} more of the {found.failing} failing cases fail in another way (below).")
    return lines


def _unexplained(verdict):
    kinds = _kinds(verdict)
    if kinds & {"value", "shape"}:
        lines = ["It is none of the known readings. Where the error lives:"]
        return lines + [line for fact in verdict.explanation.lines for line in _wrapped(f"- {fact}", "    ", "  ")]
    return ["Its values are right, its derivatives are not." if kinds == {"gradient"} else "It cannot be compared."]


def _kinds(verdict):
    return {o.kind for o in verdict.outcomes if o.case.must and not o.passed}


def _first(o):
    case = o.case
    lam = "" if case.lam is None else f", lambda = {', '.join(f'{x:g}' for x in np.ravel(case.lam))}"
    lines = [f"First case: {case.id} (L = {case.L}{lam}, {case.dtype}) {o.problem}"]
    output = (o.got or {}).get("output")
    if o.where is None or output is None or np.ndim(output) != len(o.where):
        return lines
    if len(o.where) >= 2 and (case.what in ("refine", "indirect_attention") and len(o.where) == 4):
        batch, head, row, column = o.where
        place = f"(row {row}, column {column})" + (f" of batch {batch}, head {head}" if batch or head else "")
    else:
        place = f"index {o.where}" if o.where else "the number"
    expected, got = float(o.expected[o.where]), float(output[o.where])
    lines.append(f"  at {place}: expected {expected:.10g}, got {got:.10g} (tolerance {o.tolerance:.1g})")
    return lines


def _others(verdict):
    """One line for every other kind of trouble, and for what failed beside the "must" cases."""
    lines = []
    first = next((o for o in verdict.outcomes if o.case.must and not o.passed), None)
    seen = {first.kind} if first is not None else set()
    seen.add("not asked")
    for o in verdict.outcomes:
        if not o.passed and o.case.must and o.kind not in seen:
            seen.add(o.kind)
            count = sum(p.kind == o.kind and p.case.must for p in verdict.outcomes)
            lines.append(f"Also in {count} case{'s' * (count > 1)}, first {o.case.id}: {o.problem}")
    may = [o for o in verdict.outcomes if not o.passed and not o.case.must and o.kind != "not asked"]
    if may and len(may) < len([o for o in verdict.outcomes if not o.case.must]):
        lines += [f"May: {o.case.id} {o.problem}" for o in may[:4]]
    elif may:
        lines.append(f'May: none of the {len(may)} "may" cases passes')
    if lines and first is not None:
        lines.insert(0, "")
    return lines


def _wrapped(text, indent, first=""):
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=indent)


def _capital(text):
    return text[:1].upper() + text[1:]
