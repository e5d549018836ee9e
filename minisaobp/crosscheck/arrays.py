"""The array libraries an implementation may be written in: its arrays from NumPy's and back, its own derivatives.

One class per library, imported only when asked for. `call` is all that runs of a stranger's code.
"""

import contextlib
import importlib
import inspect
import math

import numpy as np


class NumpyArrays:
    """NumPy: no derivatives."""

    name, type_name = "numpy", "numpy.ndarray"

    def __init__(self):
        self.xp = np

    def of(self, array):
        return self.xp.asarray(array).copy()

    def host(self, array):
        return np.array(array)

    def owns(self, x):
        return isinstance(x, (self.xp.ndarray, self.xp.generic))

    def settings(self):
        """What has to hold while the function runs."""
        return contextlib.nullcontext()


class CupyArrays(NumpyArrays):
    name, type_name = "cupy", "cupy.ndarray"

    def __init__(self):
        from ..backend import library

        self.xp = library("gpu")

    def host(self, array):
        return self.xp.asnumpy(array)


class TorchArrays(NumpyArrays):
    name, type_name = "torch", "torch.Tensor"

    def __init__(self):
        self.torch = importlib.import_module("torch")

    def of(self, array):
        return self.torch.tensor(array)

    def host(self, array):
        return array.detach().cpu().numpy().copy()

    def owns(self, x):
        return isinstance(x, self.torch.Tensor)

    def vjp(self, f, A, lam, dB):
        """dA, and dlam or None where the result does not depend on lam or lam is not followed."""
        A = self.of(A).requires_grad_()
        tensor = self.torch.tensor(np.asarray(lam), dtype=A.dtype).requires_grad_()
        B = f(A, tensor)
        if not B.requires_grad:
            raise TypeError("the result has no gradient: the function leaves torch, or detaches")
        return self.torch.autograd.grad(B, (A, tensor), self.of(dB), allow_unused=True)


class JaxArrays(NumpyArrays):
    name, type_name = "jax", "jax.Array"

    def __init__(self):
        self.jax = importlib.import_module("jax")
        self.xp = importlib.import_module("jax.numpy")

    def of(self, array):
        return self.xp.asarray(array)

    def owns(self, x):
        return isinstance(x, self.jax.Array)

    def settings(self):
        try:  # float64, which JAX cuts down to float32 otherwise
            return self.jax.enable_x64(True)
        except AttributeError:
            return importlib.import_module("jax.experimental").enable_x64()

    def vjp(self, f, A, lam, dB):
        dB = self.of(dB)
        try:
            _, back = self.jax.vjp(f, self.of(A), self.xp.asarray(np.asarray(lam, A.dtype)))
            return back(dB)
        except (self.jax.errors.TracerArrayConversionError, self.jax.errors.ConcretizationTypeError, TypeError):
            _, back = self.jax.vjp(lambda A: f(A, lam), self.of(A))  # lam has to be a plain number
            return *back(dB), None


LIBRARIES = {"numpy": NumpyArrays, "torch": TorchArrays, "jax": JaxArrays, "cupy": CupyArrays}


def takes_valid(fn):
    """Whether a function has an argument named valid, for padding."""
    try:
        parameter = inspect.signature(fn).parameters.get("valid")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY


def call(fn, arrays, A, lam, valid, dB=None, one_matrix=False):
    """What a function makes of one question: a dictionary of NumPy arrays and of what there is to say about them.

    "output" or "error" is always there. "type": of the output, if it is not the library's. "mutated": the names of
    arguments that were written to. "again": the output of a second call. "dA", "dlam" or "gradient_error": with dB.
    one_matrix: the function takes one (L, L) matrix, so it is called for each.
    """
    with arrays.settings(), np.errstate(all="ignore"):
        f = _for_each_matrix(fn, arrays) if one_matrix else fn
        given = {"A": arrays.of(A)}
        positional = [given["A"]]
        if lam is not None:
            given["lam"] = arrays.of(lam) if np.ndim(lam) else float(lam)
            positional.append(given["lam"])
        keywords = {}
        if valid is not None:
            given["valid"] = keywords["valid"] = arrays.of(valid)
        before = {"A": A, "lam": lam, "valid": valid}
        answer = {}
        try:
            output = f(*positional, **keywords)
            answer |= _described(output, arrays)
            written = [n for n, x in given.items() if np.ndim(before[n]) and not _same(arrays.host(x), before[n])]
            answer["mutated"] = ", ".join(written)
            if not written:
                answer["again"] = _described(f(*positional, **keywords), arrays).get("output")
        except Exception as error:  # of a stranger's code: anything
            return {"error": _one_line(error)}
        if dB is not None and "type" not in answer:
            try:
                dA, dlam = arrays.vjp(lambda A, lam: f(A, lam, **keywords), A, lam, dB)
                answer["dA"] = np.full(A.shape, math.nan) if dA is None else arrays.host(dA)
                if dlam is not None:
                    answer["dlam"] = arrays.host(dlam)
            except Exception as error:
                answer["gradient_error"] = f"raises {_one_line(error)}"
        return answer


def _described(output, arrays):
    if not arrays.owns(output):
        if isinstance(output, (float, int)) and not isinstance(output, bool):  # a measure may be a plain number
            return {"output": np.asarray(float(output))}
        module = type(output).__module__
        return {"type": type(output).__name__ if module == "builtins" else f"{module}.{type(output).__name__}"}
    return {"output": arrays.host(output)}


def _for_each_matrix(fn, arrays):
    stack = arrays.torch.stack if arrays.name == "torch" else arrays.xp.stack

    def f(A, lam=None, valid=None):
        outputs = []
        for b in range(A.shape[0]):
            for h in range(A.shape[1]):
                own = [A[b, h]]
                if lam is not None:
                    own.append(lam[h, 0, 0] if np.ndim(lam) else lam)
                outputs.append(fn(*own) if valid is None else fn(*own, valid=valid[b, 0]))
        if not all(arrays.owns(x) or isinstance(x, float) for x in outputs):
            return next(x for x in outputs if not arrays.owns(x))
        if any(isinstance(x, float) for x in outputs):
            outputs = [arrays.of(np.asarray(x)) for x in outputs]
        stacked = stack(outputs)
        return stacked.reshape((*A.shape[:2], *stacked.shape[1:]))

    return f


def _same(x, y):
    return x.shape == np.shape(y) and np.array_equal(x, y, equal_nan=np.asarray(y).dtype.kind == "f")


def _one_line(error):
    try:
        text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    except Exception:  # a stranger's too
        text = ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
