"""What a notebook prints, and how two prints of it are compared."""

import math
import re
from pathlib import Path

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SKIPPED = "skip-execution"  # Jupyter's tag for a cell that waits for a person, as sliders do
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*\d|\d)?\.?\d+(?:e[-+]?\d+)?(?![\w])|\bnan\b|\binf\b")
ROUNDING = 1e-12  # a printed number below it is the rounding of float64 itself, another on every machine


def is_skipped(cell):
    return SKIPPED in cell.metadata.get("tags", [])


def printed(cell):
    """The text of a cell's outputs, without the names of objects that stand for a picture."""
    texts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        texts.append(output.get("text", "") if not data or "image/png" in data else data.get("text/plain", ""))
    return "".join(texts)


def differences(was, now, tolerance):
    """Where two prints differ, as a list of sentences.

    Words and whole numbers have to be equal. A number with a fraction or an exponent may differ by one unit of its last
    printed digit, where another machine may round to the other side, or by `tolerance` times its size.
    """
    if NUMBER.sub("#", was).split() != NUMBER.sub("#", now).split():
        return [f"the text was {was!r} and is {now!r}"]
    pairs = zip(NUMBER.findall(was), NUMBER.findall(now), strict=True)
    return [f"{a} has become {b} in {was!r}" for a, b in pairs if not _agree(a, b, tolerance)]


def _agree(a, b, tolerance):
    if a == b:
        return True
    x, y = (float(text.replace(",", "")) for text in (a, b))
    if not (math.isfinite(x) and math.isfinite(y)):
        return False
    unit = max(_unit(a), _unit(b))
    if not unit:
        return False
    return abs(x - y) <= max(1.001 * unit, tolerance * max(abs(x), abs(y)), ROUNDING)


def _unit(text):
    """The value of the last printed digit; 0 of a whole number."""
    mantissa, _, exponent = text.partition("e")
    _, point, digits = mantissa.partition(".")
    return 10.0 ** (int(exponent or 0) - len(digits)) if point or exponent else 0.0
