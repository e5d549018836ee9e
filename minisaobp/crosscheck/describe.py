"""case.json: a case in words and numbers, the same for golden vectors and for exported questions."""

import json
import re

import numpy as np

from .tensors import sha256
from .tolerance import REASONS, scale, tolerance

SCHEMA = 1
CONCERNS = {
    "high": "Algorithm 1, Eqs. 7-11",
    "low": "Algorithm 1, Eqs. 8-11 and 16",
    "elemmul": "Eq. 15",
    "original": "Eq. 1, rows normalised",
    "entropy": "Eq. 2",
    "gtd": "Eqs. 12-13",
    "indirect_entropy": "Eqs. 12 and 14",
    "indirect_attention": "Eq. 12",
}


def inputs_of(case, gradients):
    """{name: array} that a program is given, in the case's dtype."""
    tensors = {"A": case.A.astype(case.dtype)}
    if case.valid is not None:
        tensors["valid"] = case.valid
    if case.lam is not None and np.ndim(case.lam):
        tensors["lam"] = case.lam.astype(case.dtype)
    if gradients:
        tensors["dB"] = case.upstream.astype(case.dtype)
    if case.rows is not None:
        tensors["rows"] = np.broadcast_to(case.rows, case.A.shape[:-1])
    return tensors


def described_case(case, files, tensors):
    """The dictionary of case.json for a refinement or a measure; tensors: {name: (file, role, array)}."""
    parameters = {} if case.what in ("entropy", "refine") else {"beta": 0.9, "hops": 4}
    if case.what == "refine":
        lam = {} if np.ndim(case.lam) else {"lam": float(case.lam)}
        parameters = {"variant": case.variant, "causal": case.causal, **lam}
    about = {
        "what": case.what,
        "concerns": CONCERNS[case.variant or case.what],
        "parameters": parameters,
        "seed": case.seed,
        "dtype": case.dtype,
        "flags": list(case.flags),
    }
    entries = {name: entry(*tensor, _tolerances(case, *tensor[1:])) for name, tensor in tensors.items()}
    return described(case.id, about, entries, files)


def described(name, about, entries, files):
    digests = {file: {"sha256": sha256(data)} for file, data in files.items()}
    return {"schema": SCHEMA, "id": name, **about, "tensors": entries, "files": digests}


def json_bytes(description):
    """case.json, with its short lists on one line each."""
    text = json.dumps(description, indent=1, allow_nan=False, ensure_ascii=False)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return (text + "\n").encode()


def entry(file, role, array, tolerances=None):
    """What case.json says of one tensor; tolerances: of what is to be computed."""
    about = {"file": file, "role": role, "dtype": array.dtype.name, "shape": list(array.shape)}
    return about if tolerances is None else about | {"tolerance": tolerances}


def _tolerances(case, role, array):
    if role == "input":
        return None
    gradient = role == "gradient"
    terms = 2.0 * case.L if gradient and array.shape != case.A.shape else 1.0  # dlam is a sum over the matrix
    largest = max(scale(array), terms)
    reasons = ["float64", "float32"] + ["gradient"] * gradient
    return {
        **{dtype: float(f"{tolerance(case.L, dtype, gradient) * largest:.1e}") for dtype in ("float64", "float32")},
        "reason": "; ".join(REASONS[reason] for reason in reasons),
    }
