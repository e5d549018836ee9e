"""The judge: asks a function every case, compares, and finds out which reading of the paper it is.

Axis letters: B batch, H heads, L tokens.
"""

import dataclasses
import secrets
import time
from typing import Any

import numpy as np

from ..bp import refine, refine_vjp
from . import metric_readings
from .cases import METRICS, VARIANTS, judged_cases
from .explain import Explanation, explain
from .sandbox import Died, InThread, TimeLimit
from .tolerance import scale, tolerance

MAX_ENDED = 2  # after that many calls that did not come back nothing is asked any more


@dataclasses.dataclass(eq=False)
class Outcome:
    """What became of one case. problem: None if it passed, or one line; kind: "value" if numbers differ."""

    case: Any
    expected: Any = None
    got: Any = None
    kind: str | None = (
        None  # value, gradient, error, type, shape, dtype, mutates, random, timeout, died, missing, not asked
    )
    problem: str | None = None
    where: tuple | None = None  # index of the first entry that differs
    error: float = 0.0  # largest difference, inf if the answer is not finite there
    tolerance: float = 0.0

    @property
    def passed(self):
        return self.problem is None


@dataclasses.dataclass(eq=False)
class Verdict:
    """What the judge found; `passed` says it all, `str()` is the report, `as_json()` the record."""

    name: str
    asked: dict  # what, variant, causal, arrays, gradients, seed, ...
    outcomes: list
    notes: list  # of what was not judged
    explanation: Explanation
    seconds: float

    @property
    def passed(self):
        """Whether every "must" case passed."""
        must = [o for o in self.outcomes if o.case.must]
        return bool(must) and all(o.passed for o in must)

    @property
    def readings(self):
        """Names of the readings that explain what was found, [] if it passed or nothing fits."""
        return [reading.name for reading in self.explanation.readings]

    def __str__(self):
        from .report import report

        return report(self)

    def as_json(self):
        from .report import record

        return record(self)


def crosscheck(
    fn,
    *,
    what="refine",
    variant="high",
    causal=False,
    arrays="numpy",
    gradients=False,
    one_matrix=False,
    max_length=1024,
    seed=None,
    limit=30.0,
):
    """Whether a function is SAOBP, and if not, which mistake it makes; gives a Verdict (`passed`, `str()`, `readings`).

    fn: fn(A, lam) gives the refined attention; A (B, H, L, L) and the result are arrays of the library `arrays`
        ("numpy", "torch", "jax", "cupy") of one shape and dtype, lam is a number, or (H, 1, 1) for one per head. An
        argument named `valid`, (B, 1, L) booleans, False for padding, is given if fn has one; else padding is not
        judged. For a measure, fn(A) gives (B, H) numbers, or Eq. 12's matrices.
    what: "refine", "entropy" (Eq. 2), "gtd" (Eq. 13), "indirect_entropy" (Eq. 14) or "indirect_attention" (Eq. 12).
    variant, causal: which refinement, as of `minisaobp.refine`; causal matrices are zero above the diagonal.
    gradients: compare torch's or jax's own derivatives too, up to a number per row that no softmax sees.
    one_matrix: fn takes and gives one (L, L) matrix. max_length: no longer matrices, for explicit loops.
    seed: of the drawn cases, new ones each time if None. limit: seconds for a case; in a thread of this process, so
        compiled code that does not return cannot be ended (`python -m minisaobp crosscheck` uses a process).

    Raises ValueError or TypeError on arguments it does not know, never for what fn does.

    >>> import minisaobp as ms
    >>> crosscheck(ms.refine, max_length=64).passed
    True
    >>> crosscheck(lambda A, lam: ms.refine(A, lam, include_self=True), max_length=64).readings
    ['self-message']
    """
    asked = checked(what, variant, causal, arrays, gradients, one_matrix, max_length, seed, limit)
    return judge(InThread(fn, arrays, one_matrix), getattr(fn, "__qualname__", type(fn).__name__), asked)


def checked(what, variant, causal, arrays, gradients, one_matrix, max_length, seed, limit):
    """The arguments of `crosscheck` as a dictionary, with a seed drawn if there is none. Raises ValueError."""
    if what not in ("refine", *METRICS):
        raise ValueError(f"what: expected one of refine, {', '.join(METRICS)}, got {what!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if arrays not in ("numpy", "torch", "jax", "cupy"):
        raise ValueError(f"arrays: expected numpy, torch, jax or cupy, got {arrays!r}")
    if gradients and arrays not in ("torch", "jax"):
        raise ValueError(f"gradients: {arrays} has no derivatives of its own; expected arrays torch or jax")
    if gradients and what != "refine":
        raise ValueError(f"gradients: of a refinement only, got what={what!r}")
    if not isinstance(max_length, int) or max_length < 8:
        raise ValueError(f"max_length: expected a whole number >= 8, got {max_length!r}")
    if not limit > 0:
        raise ValueError(f"limit: expected a number of seconds above 0, got {limit!r}")
    seed = secrets.randbits(32) if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: expected a whole number >= 0, got {seed!r}")
    of_refinement = (
        {"variant": variant, "causal": bool(causal), "gradients": bool(gradients)} if what == "refine" else {}
    )
    more = {"one_matrix": bool(one_matrix), "max_length": max_length, "seed": seed, "limit": limit}
    return {"what": what, **of_refinement, "arrays": arrays, **more}


def cases_of(asked):
    return judged_cases(
        asked["what"], asked.get("variant"), asked.get("causal", False), asked["seed"], asked["max_length"]
    )


def judge(runner, name, asked, cases=None, progress=lambda cases: cases):
    """The Verdict on what a runner (`sandbox`) answers to the cases. progress: wraps their list, for a bar."""
    started = time.perf_counter()
    outcomes, notes, ended = [], [], 0
    cases = cases_of(asked) if cases is None else cases
    if not runner.takes_valid:
        left = [case for case in cases if case.valid is None]
        if len(left) < len(cases):
            notes.append("padding is not judged: " + runner.without_padding)
        cases = left
    for case in progress(cases):
        if ended >= MAX_ENDED:
            outcomes.append(Outcome(case, kind="not asked", problem="is not asked any more"))
            continue
        wants_gradient = asked.get("gradients", False) and case.has_gradient
        outcomes.append(outcome_of(case, _ask(runner, case, asked["limit"], wants_gradient), wants_gradient))
        ended += outcomes[-1].kind in ("timeout", "died")
    if asked.get("gradients") and asked["variant"] in ("high", "low"):
        answered = [o.got for o in outcomes if "dA" in (o.got or {})]
        without = sum("dlam" not in got for got in answered)
        if without == len(answered):
            notes.append("the gradient of lambda is not judged: the function does not follow lam")
        elif without:
            notes.append(
                f"the gradient of lambda is not judged in {without} of {len(answered)} cases: their answers have none"
            )
    explanation = explain(outcomes, asked, lambda case: _ask(runner, case, asked["limit"]))
    runner.close()
    return Verdict(name, asked, outcomes, notes, explanation, time.perf_counter() - started)


def _ask(runner, case, limit, gradients=False):
    try:
        return runner.ask(case, limit, gradients)
    except TimeLimit:
        return {"timeout": limit}
    except Died as trouble:
        return {"died": str(trouble)}


def expected_of(case):
    return refine(case.A, case.lam, **case.options) if case.what == "refine" else metric_readings.reference(case)


def outcome_of(case, answer, wants_gradient=False):
    """The Outcome of an answer as `arrays.call` gives it."""
    outcome = Outcome(case, got=answer)
    if "invalid" in case.flags:
        if "error" not in answer:
            outcome.kind, outcome.problem = "value", "is not refused"
        return outcome
    outcome.expected = expected_of(case)
    outcome.kind, outcome.problem = _trouble(case, answer, outcome.expected)
    if outcome.kind in (None, "random", "mutates", "dtype") and answer["output"].dtype.kind == "f":
        differing(outcome, answer["output"])
    if outcome.passed and wants_gradient:
        _compare_gradient(outcome, answer)
    return outcome


def _trouble(case, answer, expected):
    """What is wrong with an answer beside its numbers: kind and one line, or None and None."""
    if "timeout" in answer:
        return "timeout", f"does not return within {answer['timeout']:g} seconds"
    for kind, words in (("died", ""), ("missing", ""), ("error", "raises ")):
        if kind in answer:
            return kind, words + answer[kind]
    if answer.get("type"):
        return "type", f"returns {answer['type']}"
    output = answer["output"]
    if output.shape != expected.shape:
        return "shape", f"returns shape {output.shape}, expected {expected.shape}"
    if output.dtype.kind != "f" or (case.what == "refine" and output.dtype != case.dtype):
        return "dtype", f"returns {output.dtype}, expected {case.dtype}"
    if answer.get("mutated"):
        return "mutates", f"writes to its argument {answer['mutated']}"
    again = answer.get("again")
    if again is not None and not _alike(output, again, tolerance(case.L, case.dtype)):
        return "random", "gives another answer when it is asked the same again"
    return None, None


def _alike(x, y, allowed):
    if x.shape != y.shape:
        return False
    same = np.isclose(x, y, rtol=0, atol=allowed * scale(x), equal_nan=True)
    return bool(same.all())


def differing(outcome, output):
    """Where the numbers of an output differ: fills in the Outcome."""
    case, expected = outcome.case, outcome.expected
    outcome.tolerance = tolerance(case.L, case.dtype) * scale(expected)
    rows = (
        None if case.rows is None or expected.ndim < 4 else np.broadcast_to(case.rows, expected.shape[:-1])[..., None]
    )
    wanted, got = (x if rows is None else np.where(rows, x, 0) for x in (expected, output.astype(np.float64)))
    with np.errstate(invalid="ignore"):
        difference = abs(got - wanted)
    bad = ~(difference <= outcome.tolerance)  # a NaN is bad
    if bad.any():
        outcome.where = tuple(int(n) for n in np.argwhere(bad)[0])
        outcome.error = float(np.where(np.isfinite(difference), difference, np.inf).max())
        if outcome.problem is None:
            outcome.kind = "value"
            outcome.problem = "is not finite" if outcome.error == np.inf else f"differs by up to {outcome.error:.2g}"


def _compare_gradient(outcome, answer):
    case, dB = outcome.case, outcome.case.upstream
    if "gradient_error" in answer:
        outcome.kind, outcome.problem = "gradient", f"its gradient {answer['gradient_error']}"
        return
    dA, dlam = refine_vjp(case.A, case.lam, dB, **case.options)
    pairs = [("A", centred(case.A, answer["dA"].astype(np.float64)), case.A * dA)]
    if "dlam" in answer and case.variant in ("high", "low"):
        pairs.append(("lam", np.asarray(answer["dlam"], np.float64), np.asarray(dlam)))
    for name, got, wanted in pairs:
        allowed = tolerance(case.L, case.dtype, gradient=True) * max(scale(wanted), _terms(case, name))
        if got.size == wanted.size == 1:  # not every language writes arrays without an axis
            got = got.reshape(wanted.shape)
        if got.shape != wanted.shape:
            outcome.kind = "gradient"
            outcome.problem = f"its gradient with respect to {name} has shape {got.shape}, expected {wanted.shape}"
            return
        with np.errstate(invalid="ignore"):
            difference = abs(got - wanted)
        bad = ~(difference <= allowed)
        if bad.any():
            outcome.kind, outcome.where = "gradient", tuple(int(n) for n in np.argwhere(bad)[0])
            outcome.error, outcome.tolerance = (
                float(np.where(np.isfinite(difference), difference, np.inf).max()),
                allowed,
            )
            differs = "is not finite" if outcome.error == np.inf else f"differs by up to {outcome.error:.2g}"
            outcome.problem = f"its gradient with respect to {name} {differs}"
            if name == "A" and (abs(got - _of_the_prior_alone(case, dB)) <= allowed).all():
                outcome.problem += ": it is that of the prior alone, as if the messages were constants (detached)"
            outcome.got, outcome.expected = answer | {"output": got}, wanted
            return


def _of_the_prior_alone(case, dB):
    """A * dA without the path through the messages."""
    B = refine(case.A, case.lam, **case.options)
    return B * (dB - (dB * B).sum(-1, keepdims=True))


def _terms(case, name):
    """How many numbers of the size of dB a gradient adds up: the whole matrix for lam."""
    return case.A.size / case.L if name == "lam" else 1.0


def centred(A, dA):
    """A * dA without the part along each row's own direction, which a softmax before it does not see."""
    held = A > 0
    weighed = np.where(held, A * np.where(held, dA, 0), 0)
    return weighed - A * weighed.sum(-1, keepdims=True)
