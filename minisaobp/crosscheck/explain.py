"""From what a function answered to which reading of the paper it is, or to where its error lives.

Answers that are not finite are explained apart from those that are: a product that overflows, an empty row that
poisons the others. The finite ones are compared with every known reading, then with two at once, with another lambda
and with rounding; if none fits, what the failing cases have in common is said.
"""

import dataclasses
import itertools

import numpy as np

from ..bp import refine
from . import metric_readings, readings
from .cases import Case, in_units
from .locate import common
from .readings import Reading, over_rows

SMALL = 64  # tokens: what readings are compared on, unless only longer cases fail
NEAR = 2e-6  # a reading in which some number was kept in float32 is still recognised; readings differ by 1e-4 and more


@dataclasses.dataclass
class Explanation:
    """readings: what fits, [] if nothing does. lines: what there is to say beside their words, one fact each."""

    readings: list = dataclasses.field(default_factory=list)
    lines: list = dataclasses.field(default_factory=list)
    together: bool = False  # the first two fit together only, two faults at once
    alternatives: int = 1  # how many of the first readings say the same of all that was asked
    explained: int = 0  # failing cases with numbers that they explain
    failing: int = 0


def explain(outcomes, asked, ask):
    """The Explanation of Outcomes. ask(case): puts one more question to the function, as `arrays.call` answers it."""
    failing = [o for o in outcomes if not o.passed and o.case.must]
    judged = [o for o in outcomes if o.case.must and _has_numbers(o)]
    found = Explanation(failing=len(failing))
    broken = [o for o in judged if not o.passed and _broken(o)]
    wrong = [o for o in judged if o not in broken and not o.passed and (o.where is not None or o.kind == "shape")]
    right = [o for o in judged if o.passed]
    fits = bool(wrong) and _explain_by_a_reading(found, wrong, right, asked)
    if fits:  # a reading may itself give rows that vanish
        forms = [form for reading in found.readings for form in reading.forms]
        explained = [o for o in broken if any(_agrees(form, o)[0] for form in forms)]
        found.explained += len(explained)
        broken = [o for o in broken if o not in explained]
    if broken:
        lost = _explain_broken(found, broken, [o for o in judged if o not in broken], right, asked, ask)
        if not fits:  # near the end of its range a product may lose some labels only
            found.explained += sum(lost(o.case) for o in wrong)
            wrong = [o for o in wrong if not lost(o.case)]
    if wrong and not fits:
        _explain_otherwise(found, wrong, right, asked, ask)
    if failing and not found.readings:
        found.lines += common(outcomes)
    return found


def _has_numbers(o):
    output = (o.got or {}).get("output")
    numbers = o.expected is not None and output is not None and output.dtype.kind == "f"
    return numbers and o.kind not in ("gradient", "random")


def _broken(o):
    """Whether every wrong row of a refinement is not finite, or all zero: a product that is lost."""
    output = o.got["output"]
    if o.case.what != "refine" or o.where is None or output.shape != o.expected.shape:
        return o.where is not None and not np.isfinite(output).all()
    lost = ~np.isfinite(output).all(-1) | (output == 0).all(-1)
    with np.errstate(invalid="ignore"):
        bad = ~(abs(output - o.expected) <= o.tolerance).all(-1)
    if o.case.rows is not None:
        bad = bad & o.case.rows
    return bool((lost | ~bad).all())


# ---- answers that are not finite ------------------------------------------------------------------------------------

OVERFLOW = Reading(
    "direct-product-overflows",
    "the direct product of messages leaves the range of its dtype",
    "Eqs. 9 and 11: prod_i m_i(k) grows like e^(lambda L) (BP-Low: falls like e^(-lambda L)); its logarithm does not",
    (),
)
POISON = Reading(
    "empty-rows-poison",
    "empty rows poison: a row without attention sends the message 0, which makes every product 0",
    "Eq. 9 with S_i = 0; a token that attends to nothing has nothing to send",
    (),
)


def _explain_broken(found, broken, finite, right, asked, ask):
    """Adds to found; gives a function that says of a case whether it is one in which a product is lost."""
    emptied = [o for o in broken if _has_empty_row(o.case)]
    rest = [o for o in broken if o not in emptied]
    spared = any(not _has_empty_row(o.case) for o in finite)  # else it is not the empty row that does it
    if emptied and spared and not any(_has_empty_row(o.case) for o in right):
        found.readings.append(POISON)
        found.explained += len(emptied)
    if asked["what"] == "refine" and asked["variant"] in readings.POTTS and rest:
        uses_lambda = any(reading.name == "lambda-for-exp" for reading in found.readings)
        for size in [_direct_size, _closed_size] + [_lambda_size] * uses_lambda:
            held = {d: max([5.0, *(size(o.case) for o in right if o.case.dtype == d)]) for d in ("float32", "float64")}
            if all(size(o.case) > held[o.case.dtype] for o in rest):
                found.readings.append(OVERFLOW)
                found.explained += len(rest)
                found.lines.append(_first_length(rest[0], asked, ask))
                return lambda case: size(case) > held[case.dtype]
    if rest:
        found.lines.append(f"not finite in {len(rest)} cases, first {rest[0].case.id}")
    return lambda case: False


def _has_empty_row(case):
    A = case.A if case.valid is None else case.A * (case.valid[..., :, None] & case.valid[..., None, :])
    return bool(((np.tril(A) if case.causal else A).sum(-1) == 0).any())


def _signed(case):
    return -np.asarray(case.lam) if case.variant == "low" else np.asarray(case.lam)


def _direct_size(case):
    """Largest |log| of a product of the messages of Eq. 9 as printed."""
    lam = _signed(case)
    return float(abs((lam + np.log1p(np.expm1(-lam) * case.A)).sum(-2)).max())


def _closed_size(case):
    """The same without the constant e^lambda of every message."""
    return float(abs(np.log1p(np.expm1(-_signed(case)) * case.A).sum(-2)).max())


def _lambda_size(case):
    """The same with lambda for e^lambda."""
    lam = _signed(case)
    return float(abs(np.log(np.maximum(abs(case.A + lam * (1 - case.A)), 1e-300)).sum(-2)).max())


def _first_length(outcome, asked, ask):
    """The length from which on uniform attention at that lambda and dtype is lost, by bisection."""
    dtype, lam = outcome.case.dtype, outcome.case.lam

    def lost(L):
        units = in_units(np.ones((L, L), np.int64) if not asked["causal"] else np.tri(L, dtype=np.int64))
        case = Case(f"uniform-L{L}", 0, units[None, None], variant=asked["variant"], causal=asked["causal"], lam=lam,
                    dtype=dtype)  # fmt: skip
        output = ask(case).get("output")
        return output is None or not np.isfinite(output).all() or (output == 0).all(-1).any()

    where = f"lambda = {np.max(lam):g}, {dtype}"
    low, high = 1, outcome.case.L
    if not lost(high):
        return f"first lost in case {outcome.case.id}: L = {high}, {where}"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if lost(middle) else (middle, high)
    return f"finite up to L = {low}, lost from L = {high} on (uniform attention, {where})"


# ---- finite answers -------------------------------------------------------------------------------------------------


def _compared(wrong, right):
    """Which cases readings are compared on: short ones in float64, unless only others are wrong."""
    wrong = [o for o in wrong if o.case.L <= SMALL] or wrong
    wrong = [o for o in wrong if o.case.dtype == "float64"] or wrong
    return wrong, [o for o in right if o.case.L <= SMALL and o.case.dtype == "float64"]


def _known(asked):
    if asked["what"] == "refine":
        return readings.known(asked["variant"], asked["causal"])
    return metric_readings.known(asked["what"])


def _explain_by_a_reading(found, wrong, right, asked):
    """Adds to found the readings that explain all that is wrong; whether there is one."""
    small, others = _compared(wrong, right)
    near = all(o.kind != "shape" and o.error <= NEAR * max(1.0, o.tolerance / 1e-9) for o in small)
    if near and small[0].case.dtype == "float64":
        found.readings.append(SINGLE)
        found.lines.append(f"the largest difference is {max(o.error for o in small):.1g}")
    for passing in (others, []):  # a reading explains everything, or at least everything that is wrong
        if not found.readings:
            found.readings += [r for r in _known(asked) if any(_fits(form, small, passing) for form in r.forms)]
            found.alternatives = max(1, len(found.readings))
            if found.readings and others and not passing:
                found.lines += ["elsewhere it is the reference", *common(wrong + right)]
    found.explained += len(wrong) if found.readings else 0
    return bool(found.readings)


def _explain_otherwise(found, wrong, right, asked, ask):
    """Adds another lambda, rounding, or two readings at once to found, if one of them explains what is wrong."""
    small, others = _compared(wrong, right)
    line, reading = None, []
    shaped = asked["what"] == "refine" and all(o.kind != "shape" for o in small)
    if shaped and asked["variant"] in readings.POTTS:
        line, reading = _another_lambda(small, others), [ANOTHER_LAMBDA]
    if not line and shaped:
        line, reading = _rounding(small, ask), [ROUNDING]
    if line:
        found.lines.append(line)
    else:
        reading = _two_at_once(_known(asked), small, others) if all(o.case.L <= SMALL for o in small) else None
        found.together = bool(reading)
    if reading:
        found.readings = reading + found.readings
        found.explained += len(wrong)


def _predicted(case, form):
    measure = readings.refined if case.what == "refine" else metric_readings.measured
    with np.errstate(all="ignore"):
        return measure(case, **form)


def _fits(form, wrong, right):
    """Whether a reading gives what the function gives in all these cases, and says anything about the wrong ones."""
    if _scales(form, wrong[0].case):
        sums = np.concatenate([np.ravel(o.got["output"].sum(-1)) for o in wrong])
        if (abs(sums - 1) < 1e-6).all():
            return False
    said = False
    for o in itertools.chain(wrong, right):
        agrees, says = _agrees(form, o)
        if not agrees:
            return False
        said |= says and not o.passed
    return said


def _scales(form, case):
    """Whether a reading leaves a factor per row open."""
    return form.get("over") == "nothing" and case.what == "refine"


def _agrees(form, o):
    """Whether a reading gives the answer of one case, and whether it says there what the reference does not."""
    form, scaled = dict(form), _scales(form, o.case)
    if scaled:
        del form["over"]
    got, reading = o.got["output"].astype(np.float64), _predicted(o.case, form)
    if reading.shape != got.shape:
        return False, False
    if scaled:
        got = over_rows(got)
    told = np.isfinite(reading)
    if o.case.rows is not None and got.ndim == 4:
        told &= np.broadcast_to(o.case.rows, got.shape[:-1])[..., None]
    allowed = max(4 * o.tolerance, NEAR) * max(1.0, float(abs(got[told]).max(initial=0)))
    with np.errstate(invalid="ignore"):
        agrees = bool((abs(got - reading)[told] <= allowed).all())
        other = reading.shape != o.expected.shape or (abs(reading - o.expected)[told] > 10 * allowed).any()
    return agrees, bool(scaled or other)


def _two_at_once(known, wrong, right):
    """Two readings that fit together, or None. Compared on short cases first: there are hundreds of pairs."""
    order = sorted(wrong, key=lambda o: o.case.L)
    short = [o for o in order if o.case.L <= 8] or order[:2]
    others = [o for o in right if o.case.L <= 8]
    for one, other in itertools.combinations(known, 2):
        for a, b in itertools.product(one.forms, other.forms):
            if set(a) & set(b) or "variant" in {*a, *b} or "steps" in {*a, *b}:
                continue
            both = a | b
            if _fits(both, short[:4], []) and _fits(both, short, others) and _fits(both, wrong, right):
                return [one, other]
    return None


ANOTHER_LAMBDA = Reading(
    "another-lambda",
    "the right refinement with another lambda",
    "Eq. 7 has e^lambda, Table 4 lambda = 0.2, 0.08 and 0.05",
    (),
)


def _another_lambda(wrong, right):
    """One line that says which lambda was used for which, or None if no lambda explains an answer."""
    used = {}
    for o in [*wrong, *right]:
        if np.ndim(o.case.lam) or o.case.L < 3 or "edge" in o.case.flags or o.case.id.startswith("drawn"):
            continue
        lam = _fitted_lambda(o)
        if lam is None:
            return None
        used.setdefault(round(float(o.case.lam), 4), set()).add(round(lam, 4) + 0.0)
    if not used or all(values == {lam} for lam, values in used.items()):
        return None
    values = {v for found in used.values() for v in found}
    if len(values) == 1 and len(used) > 1:
        return f"it uses lambda = {values.pop():g} whatever it is given"
    shown = ", ".join(f"{lam:g} -> {'/'.join(f'{v:g}' for v in sorted(used[lam]))}" for lam in sorted(used)[:6])
    return f"lambda given -> lambda used: {shown}"


def _fitted_lambda(o):
    """The lambda at which the reference gives this answer, by Gauss-Newton; None if none does."""
    case, got, lam = o.case, o.got["output"].astype(np.float64), float(o.case.lam)
    rows = 1.0 if case.rows is None else np.broadcast_to(case.rows, got.shape[:-1])[..., None]
    for _ in range(25):
        B = refine(case.A, lam, **case.options)
        difference = (got - B) * rows
        if abs(difference).max() <= 4 * o.tolerance or abs(difference).max() <= 4e-9:
            return lam
        slope = (refine(case.A, lam + 1e-6, **case.options) - refine(case.A, lam - 1e-6, **case.options)) * rows / 2e-6
        if not (slope * slope).sum() > 0:
            return None
        lam = float(np.clip(lam + (difference * slope).sum() / (slope * slope).sum(), -8, 8))
    return None


SINGLE = Reading(
    "single-precision",
    "the right formula, with some number kept in float32 although A is float64 (lambda or its exponential, say)",
    "none: it concerns the dtype alone",
    (),
)
ROUNDING = Reading(
    "half-precision",
    "accumulation in low precision: the formula is right, and its sums or products are rounded too early",
    "Eq. 11 multiplies L messages that differ from one another by little; 11 bits do not hold their product",
    (),
)


def _rounding(wrong, ask):
    """One line if the answers are the reference rounded on the way: a tiny change of A makes them jump, or does not
    change them at all, where the reference follows smoothly. None otherwise."""
    worst = max(o.error for o in wrong)
    if worst > 0.2:
        return None
    outcome = max((o for o in wrong if o.case.L <= SMALL), key=lambda o: (o.case.L, o.error), default=wrong[0])
    case, base = outcome.case, outcome.got["output"].astype(np.float64)
    jumps = []
    for n in range(8):
        rng = np.random.default_rng(n)
        A = case.A * (1 + 2.0**-16 * rng.uniform(-1, 1, case.A.shape))
        moved = dataclasses.replace(case, A=A)
        output = ask(moved).get("output")
        if output is None or output.shape != base.shape:
            return None
        smooth = refine(A, case.lam, **case.options) - outcome.expected
        visible = outcome.expected > 1e-4
        with np.errstate(all="ignore"):
            jumps.append(abs(output - base - smooth)[visible] / outcome.expected[visible])
    jump, relative = float(np.max(jumps)), outcome.error / max(float(outcome.expected.max()), 1e-12)
    if not 5e-5 < jump < 0.5 or outcome.error > 100 * jump:
        return None
    bits = int(np.clip(round(-np.log2(jump)), 1, 52))
    return f"a change of A by 1e-5 makes it jump by {jump:.1g} of an entry, as if about {bits} bits were kept" * (
        relative > 0
    )
