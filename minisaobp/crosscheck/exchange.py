"""Questions and answers in files, for a program in any language: export, run it, import.

A folder has `manifest.json` and one folder per case with `case.json` and the inputs, as `inputs.safetensors` or as one
.npy file per tensor. The program writes its answer beside them: `output.safetensors` with B (and dA, dlam), or `B.npy`
(and `dA.npy`, `dlam.npy`); of a measure, `value`. `data/vectors/README.md` explains the formats.
"""

import json

import numpy as np

from ..files import write_json, write_whole
from .cases import METRICS
from .describe import SCHEMA, described_case, inputs_of, json_bytes
from .judge import cases_of, checked
from .tensors import NotTensors, npy_bytes, read_npy, read_safetensors, safetensors_bytes, sha256

MANIFEST = "manifest.json"
FORMATS = ("safetensors", "npy")


class NotExported(ValueError):
    """A folder that `export` did not write, or not this version of it; says what is wrong."""


def asked_cases(asked):
    """The cases of a folder: none that is to be refused, for which there is no answer to write."""
    return [case for case in cases_of(asked) if "invalid" not in case.flags]


def export(folder, asked, form="safetensors"):
    """Write the questions into a folder, made if it is not there; gives their number."""
    cases = asked_cases(asked)
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = []
    for case in cases:
        own = folder / case.id
        own.mkdir(exist_ok=True)
        files, roles = _files_of(case, asked, form)
        fingerprint += [sha256(data) for data in files.values()]
        for name, data in (files | {"case.json": json_bytes(described_case(case, files, roles))}).items():
            write_whole(own / name, lambda file, data=data: file.write(data))
    manifest = {
        "schema": SCHEMA,
        "asked": asked,
        "format": form,
        "answer": _wanted(asked),
        "cases": [case.id for case in cases],
        "sha256": sha256("".join(fingerprint).encode()),
    }
    write_json(folder / MANIFEST, manifest)  # last: a folder with a manifest is whole
    return len(cases)


def _files_of(case, asked, form):
    inputs = inputs_of(case, asked.get("gradients", False) and case.has_gradient)
    if form == "npy":
        files = {f"{name}.npy": npy_bytes(array) for name, array in inputs.items()}
        return files, {name: (f"{name}.npy", "input", array) for name, array in inputs.items()}
    file = "inputs.safetensors"
    return {file: safetensors_bytes(inputs)}, {name: (file, "input", array) for name, array in inputs.items()}


def _wanted(asked):
    if asked["what"] in METRICS:
        return ["value"]
    return ["B", "dA", "dlam"] if asked["gradients"] else ["B"]


class Answers:
    """A runner, as those in `sandbox`, that answers from a folder. Raises NotExported."""

    without_padding = "no case with a tensor named valid is answered"

    def __init__(self, folder):
        path = folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise NotExported(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise NotExported(f"{path} cannot be read as JSON ({error})") from None
        try:
            asked, form = manifest["asked"], manifest["format"]
            if manifest["schema"] != SCHEMA or form not in FORMATS:
                raise NotExported(f"{path}: expected schema {SCHEMA}, got {manifest['schema']!r}, format {form!r}")
            names = ("variant", "causal", "gradients")
            more = {name: asked.get(name, default) for name, default in zip(names, ("high", False, False), strict=True)}
            rest = {name: asked[name] for name in ("what", "one_matrix", "max_length", "seed", "limit")}
            checked(**more | rest | {"arrays": "torch"})
            self.asked, self.cases, self.wanted = asked, asked_cases(asked), _wanted(asked)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, NotExported):
                raise
            raise NotExported(
                f"{path} is not what crosscheck --export wrote ({type(error).__name__}: {error})"
            ) from None
        fingerprint = [sha256(data) for case in self.cases for data in _files_of(case, asked, form)[0].values()]
        if manifest.get("sha256") != sha256("".join(fingerprint).encode()):
            raise NotExported(f"{path} was written by another version of minisaobp: export again")
        self.folder = folder
        answered = [case for case in self.cases if self._exists(case)]
        if not answered:
            raise NotExported(
                f"{folder} has no answer: expected output.safetensors or {self.wanted[0]}.npy in the cases"
            )
        self.takes_valid = any(case.valid is not None for case in answered)

    def _exists(self, case):
        own = self.folder / case.id
        return (own / "output.safetensors").exists() or (own / f"{self.wanted[0]}.npy").exists()

    def ask(self, case, limit=None, gradients=False):
        own, first = self.folder / case.id, self.wanted[0]
        if not self._exists(case):
            return {"missing": "has no answer in its folder"}
        try:
            if (own / "output.safetensors").exists():
                tensors = read_safetensors(own / "output.safetensors")
            else:
                tensors = {
                    name: read_npy(own / f"{name}.npy") for name in self.wanted if (own / f"{name}.npy").exists()
                }
        except NotTensors as error:
            return {"missing": f"has no answer that can be read: {error}"}
        if first not in tensors:
            return {"missing": f"has no tensor {first} in its answer, but {', '.join(sorted(tensors)) or 'none'}"}
        found = {"output": np.array(tensors[first])}
        if "dA" in self.wanted:
            given = {name: np.array(tensors[name]) for name in ("dA", "dlam") if name in tensors}
            strange = next((name for name, array in given.items() if array.dtype.kind not in "fiu"), None)
            if "dA" not in given or given["dA"].shape != case.A.shape:
                found["gradient_error"] = f"is not there: no dA of shape {case.A.shape}"
            elif strange:
                found["gradient_error"] = f"is not a number: {strange} is {given[strange].dtype}"
            else:
                found |= given
        return found

    def close(self):
        pass
