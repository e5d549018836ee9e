"""How far an answer may be from the reference, and why."""

import numpy as np

REASONS = {
    "float64": "float64: L logarithms or messages err by L 1e-16, a guard such as log(A + 1e-10) by 1e-10; every known "
    "fault is beyond 1e-6",
    "float32": "float32: each of L messages, and a few more numbers, are rounded by 6e-8 of the largest",
    "gradient": "a gradient adds up such terms: times ten",
}


def tolerance(L, dtype, gradient=False):
    """Largest allowed |answer - reference|, for answers whose largest entry is 1 or less.

    >>> tolerance(8, "float64"), round(tolerance(8, "float32"), 7)
    (1e-09, 4.3e-06)
    """
    allowed = 1e-9 if dtype == "float64" else (L + 64) * 2.0**-24
    return allowed * (10 if gradient else 1)


def scale(expected):
    """What the tolerance is relative to: the largest finite entry, at least 1."""
    finite = expected[np.isfinite(expected)]
    return max(1.0, float(abs(finite).max())) if finite.size else 1.0
