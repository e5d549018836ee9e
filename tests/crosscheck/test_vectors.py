"""The golden vectors in data/vectors/v1: reproduced byte for byte, and what our own code gives."""

import json
from pathlib import Path

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.crosscheck.exact import check_long_double
from minisaobp.crosscheck.tensors import read_safetensors, safetensors_bytes, sha256
from minisaobp.crosscheck.vectors import golden_files

VECTORS = Path(__file__).parents[2] / "data" / "vectors"
FOLDER = VECTORS / "v1"
SIZE = 20e6


def cases():
    for path in sorted(FOLDER.glob("*/case.json")):
        yield path.parent, json.loads(path.read_text(encoding="utf-8"))


def test_they_are_reproduced_byte_for_byte():
    try:
        check_long_double()
    except ValueError as error:
        pytest.skip(str(error))
    made = golden_files()
    there = {str(path.relative_to(FOLDER).as_posix()): path for path in FOLDER.rglob("*") if path.is_file()}
    assert made.keys() == there.keys()
    differing = [name for name, path in there.items() if path.read_bytes() != made[name]]
    assert not differing
    assert sum(map(len, made.values())) < SIZE


def test_every_case_is_as_the_schema_says():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((VECTORS / "case.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for folder, case in cases():
        validator.validate(case)
        assert case["id"] == folder.name
        assert {name: sha256((folder / name).read_bytes()) for name in case["files"]} == {
            name: about["sha256"] for name, about in case["files"].items()
        }
        tensors = read_safetensors(folder / "tensors.safetensors")
        assert {n: (x.dtype.name, list(x.shape)) for n, x in tensors.items()} == {
            n: (about["dtype"], about["shape"]) for n, about in case["tensors"].items()
        }
    broken = case | {"flags": ["edge"]}
    assert not validator.is_valid(broken) and not validator.is_valid(case | {"schema": 2})


def test_the_cases_that_the_format_promises():
    asked = {
        (c["parameters"].get("variant"), c["parameters"].get("causal"), "valid" in c["tensors"]) for _, c in cases()
    }
    assert {(v, c, p) for v in ("high", "low", "elemmul", "original") for c in (0, 1) for p in (0, 1)} <= asked
    lams = {c["parameters"].get("lam", "per head") for _, c in cases() if c["what"] == "refine"}
    assert {0.0, 0.05, 0.2, 1.0, -0.2, "per head"} <= lams
    lengths = {c["tensors"]["A"]["shape"][-1] for _, c in cases() if c["what"] == "refine"}
    assert {1, 2, 3, 8, 16, 64, 128, 512} <= lengths
    assert {"entropy", "gtd", "indirect_entropy", "indirect_attention", "block", "bert", "gpt2"} <= {
        c["what"] for _, c in cases()
    }


def test_our_refinement_gives_them():
    for folder, case in cases():
        if case["what"] != "refine" or "invalid" in case["flags"]:
            continue
        tensors = read_safetensors(folder / "tensors.safetensors")
        A, parameters = tensors["A"], case["parameters"]
        lam = tensors.get("lam", parameters.get("lam"))
        options = {name: parameters[name] for name in ("variant", "causal")} | {"valid": tensors.get("valid")}
        close(case, tensors, B=ms.refine(A, lam, **options))
        if "dB" in tensors:
            dA, dlam = ms.refine_vjp(A, lam, tensors["dB"], **options)
            close(case, tensors, dA=dA, dlam=dlam)
        if "log_beliefs" in tensors:  # what a program may check on its way
            l = tensors["log_beliefs"]
            B = np.exp(l - np.where(np.isfinite(l.max(-1)), l.max(-1), 0)[..., None])
            B /= np.maximum(B.sum(-1, keepdims=True), 1e-300)
            close(case, tensors, 1, B=B)  # logarithms of up to 300, with 40 bits


def test_our_measures_give_them():
    functions = {name: getattr(ms, name) for name in ("gtd", "indirect_entropy", "indirect_attention")}
    functions["entropy"] = ms.attention_entropy
    for folder, case in cases():
        if case["what"] in functions:
            tensors = read_safetensors(folder / "tensors.safetensors")
            close(case, tensors, value=functions[case["what"]](tensors["A"], valid=tensors.get("valid")))


def close(case, tensors, share=0.01, **found):
    """Within a share of the tolerance, a hundredth: the golden numbers are rounded far below it."""
    for name, ours in found.items():
        allowed = case["tensors"][name]["tolerance"]["float64"] * share
        np.testing.assert_allclose(ours, tensors[name], rtol=0, atol=allowed, err_msg=f"{case['id']} {name}")


def test_safetensors_are_written_in_one_order():
    x, y = np.arange(3.0), np.ones((2, 2), bool)
    assert safetensors_bytes({"x": x, "y": y}) == safetensors_bytes({"y": y, "x": x})
