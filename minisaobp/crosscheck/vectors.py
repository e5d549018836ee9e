"""The golden vectors: `python -m minisaobp.crosscheck.vectors DIR` writes them, the same bytes on every machine.

Inputs are whole numbers over a power of two; answers are computed in long double and rounded to 40 bits (`exact.py`),
those of models in float64 and rounded to 2^-28 (`models.py`). `data/vectors/README.md` explains the format.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

from ..files import write_whole
from .cases import golden_cases
from .describe import described_case, inputs_of, json_bytes
from .exact import check_long_double, metric, refinement, rounded
from .models import model_cases
from .tensors import safetensors_bytes

FILE = "tensors.safetensors"
ROLES = {"B": "output", "value": "output", "dA": "gradient", "dlam": "gradient"}
LONGEST_WITH_GRADIENTS = 128  # what is longer has A and B alone, for the sake of its size


def golden_files():
    """{path: bytes} of all golden vectors, paths relative to their folder. Raises ValueError without long double."""
    check_long_double()
    files = {}
    for case in golden_cases():
        files |= _in_folder(case.id, *_case_files(case))
    for name, tensors, description in model_cases():
        files |= _in_folder(name, tensors, description)
    return files


def _case_files(case):
    whole = case.L <= LONGEST_WITH_GRADIENTS
    gradients = case.has_gradient and whole
    inputs = inputs_of(case, gradients)
    found = {}
    if "invalid" not in case.flags:  # which is to be refused, and has no answer
        with np.errstate(divide="ignore"):
            found = refinement(case) if case.what == "refine" else metric(case)
        left_out = set() if gradients else {"dA", "dlam"}
        found = {name: rounded(x) for name, x in found.items() if name not in left_out and (whole or name == "B")}
    tensors = {name: (FILE, "input", array) for name, array in inputs.items()}
    tensors |= {name: (FILE, ROLES.get(name, "intermediate"), array) for name, array in found.items()}
    files = {FILE: safetensors_bytes(inputs | found)}
    return files, described_case(case, files, tensors)


def _in_folder(name, files, description):
    files = files | {"case.json": json_bytes(description)}
    return {f"{name}/{file}": data for file, data in files.items()}


def write(folder):
    """Write the golden vectors; folders of cases that are no longer among them are removed. Gives their size."""
    files = golden_files()
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.partition("/")[0] for path in files}
    for old in folder.iterdir():
        if old.name not in names and (old / "case.json").exists():
            shutil.rmtree(old)
    for path, data in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        write_whole(folder / path, lambda file, data=data: file.write(data))
    return len(names), sum(map(len, files.values()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m minisaobp.crosscheck.vectors DIR")
    try:
        count, size = write(Path(sys.argv[1]))
    except (ValueError, OSError) as error:
        print(f"minisaobp.crosscheck.vectors: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Wrote {count} cases, {size / 1e6:.1f} MB, to {sys.argv[1]}")
