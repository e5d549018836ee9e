"""Cross-check: whether an implementation, in any framework, is SAOBP, and if not, which mistake it makes.

`cases.py` has the questions, `readings.py` and `metric_readings.py` the known answers, right and wrong, `judge.py`
compares, `explain.py` and `locate.py` find the reading or where the error lives, `report.py` says it. A stranger's
function runs in `sandbox.py`, by way of the array libraries of `arrays.py`; programs in other languages answer through
files (`exchange.py`). `exact.py`, `models.py` and `vectors.py` make the golden vectors in `data/vectors/`.
"""

from .judge import Verdict, crosscheck

__all__ = ["Verdict", "crosscheck"]
