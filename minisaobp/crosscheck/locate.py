"""Where an error lives, when no reading fits: what the failing cases have in common and the passing ones have not."""

import numpy as np


def common(outcomes):
    """Lines that tell failing from passing "must" cases: lengths, lambdas, dtypes, padding, rows and columns."""
    must = [o for o in outcomes if o.case.must]
    failing, passing = [o for o in must if not o.passed], [o for o in must if o.passed]
    lines = []
    if not failing:
        return lines
    if passing:
        lines += [line for line in (_order("L", *_values("L", failing, passing)), _lambdas(failing, passing)) if line]
        for words, holds in (
            ("in float32", lambda o: o.case.dtype == "float32"),
            ("in float64", lambda o: o.case.dtype == "float64"),
            ("where A holds several matrices", lambda o: o.case.A.shape[0] * o.case.A.shape[1] > 1),
            ("in padded cases", lambda o: o.case.valid is not None),
            ("in edge cases", lambda o: "edge" in o.case.flags),
            ("in drawn cases", lambda o: o.case.id.startswith("drawn")),
            ("where a row of A has a zero", lambda o: bool((_seen(o.case) == 0).any())),
        ):
            if all(map(holds, failing)) and not all(map(holds, must)):
                share = sum(map(holds, must))
                lines.append(f"only {words} ({len(failing)} of {share})")
    else:
        lambdas = ", every lambda" if failing[0].case.lam is not None else ""
        lines.append(f"in every case: every length{lambdas}")
    return lines + _entries(failing)


def _seen(case):
    """A, with 1 where the mask hides it."""
    A = np.where(np.tri(case.L, dtype=bool), case.A, 1) if case.causal else case.A
    if case.valid is not None:
        A = np.where(case.valid[..., :, None] & case.valid[..., None, :], A, 1)
    return A


def _values(name, failing, passing):
    return [[getattr(o.case, name) for o in outcomes] for outcomes in (failing, passing)]


def _order(name, failing, passing):
    if min(failing) > max(passing):
        return f"only at {name} >= {min(failing)} (passes up to {name} = {max(passing)})"
    if max(failing) < min(passing):
        return f"only at {name} <= {max(failing)}"
    never = sorted(set(passing) - set(failing))
    if never and max(never) < min(failing):
        return f"at {name} from {min(failing)} on, not at {name} = {', '.join(map(str, never))}"
    return None


def _lambdas(failing, passing):
    compared = [[o for o in some if o.case.lam is not None and o.case.L >= 3] for some in (failing, passing)]
    compared = [[o for o in some if "edge" not in o.case.flags] for some in compared]
    lams = [{float(x) for o in some for x in np.ravel(o.case.lam)} for some in compared]
    if not lams[0] or not lams[1] or lams[0] & lams[1]:
        return None
    if all(lam < 0 for lam in lams[0]) and not any(lam < 0 for lam in lams[1]):
        return "only at negative lambda"
    if lams[1] == {0.0}:
        return "at every lambda but 0"
    if min(map(abs, lams[0])) > max(map(abs, lams[1])):
        return f"only at |lambda| >= {min(map(abs, lams[0])):g} (passes up to {max(map(abs, lams[1])):g})"
    if len(lams[1]) <= 3:
        return f"at every lambda but {', '.join(f'{x:g}' for x in sorted(lams[1]))}"
    return f"at lambda = {', '.join(f'{x:g}' for x in sorted(lams[0])[:6])}"


def _entries(failing):
    """Which entries of the failing answers differ."""
    shown = [o for o in failing if o.where is not None and o.kind != "gradient" and o.case.what == "refine"]
    shown = [o for o in shown if o.got["output"].shape == o.expected.shape and o.case.L > 1]
    if not shown:
        return []
    wrong, size, sums, zeros, negative = [], [], [], [], False
    for o in shown:
        output = o.got["output"].astype(np.float64)
        with np.errstate(invalid="ignore"):
            bad = ~(abs(output - o.expected) <= o.tolerance)
        if o.case.rows is not None:
            bad &= np.broadcast_to(o.case.rows, bad.shape[:-1])[..., None]
        wrong.append(bad)
        zeros.append(bool((~bad | (o.case.A == 0)).all()))
        finite = np.isfinite(output).all(-1) & bad.any(-1)
        sums.append(output.sum(-1)[finite])
        negative |= bool((output < 0).any())
        size.append((o.error, o.case))
    lines = []
    places = {
        "on the diagonal": lambda b: ~np.eye(b.shape[-1], dtype=bool),
        "in the first row": lambda b: np.arange(b.shape[-1])[:, None] > 0,
        "in the last row": lambda b: np.arange(b.shape[-1])[:, None] < b.shape[-1] - 1,
        "in the first column": lambda b: np.arange(b.shape[-1]) > 0,
        "in the last column": lambda b: np.arange(b.shape[-1]) < b.shape[-1] - 1,
        "above the diagonal": lambda b: np.tri(b.shape[-1], dtype=bool),
    }
    here = [words for words, outside in places.items() if not any((b & outside(b)).any() for b in wrong)]
    not_here = {"first row": lambda b: b[..., :1, :], "last row": lambda b: b[..., -1:, :]}
    if here:
        lines.append(f"only {here[0]}")
    elif all(zeros):
        lines.append("only where A is exactly 0: a guard such as log(A + eps) gives these entries weight")
    else:
        share = np.mean([b.any(-1).mean() for b in wrong])
        apart = [f"never in the {name}" for name, part in not_here.items() if not any(part(b).any() for b in wrong)]
        lines.append(f"in {share:.0%} of the rows of these cases" + (f", {', '.join(apart)}" if apart else ""))
    sums = np.concatenate(sums)
    if sums.size and (abs(sums - 1) > 1e-4).any():
        lines.append(f"rows do not sum to 1: from {sums.min():.3g} to {sums.max():.3g}")
    elif sums.size:
        lines.append("the rows sum to 1 all the same")
    if negative:
        lines.append("some entries are negative")
    largest = max(size, key=lambda pair: pair[0])
    lines.append(f"the largest difference, {largest[0]:.2g}, is in case {largest[1].id}")
    return lines
