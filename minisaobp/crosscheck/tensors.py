"""Tensors in files that are the same bytes for the same numbers: safetensors with its names in order, or .npy."""

import hashlib
import io
import json

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

DTYPES = {"float64": "F64", "float32": "F32", "bool": "BOOL", "int64": "I64"}


class NotTensors(ValueError):
    """A file that holds no tensors, or none of a kind that can be read; says which and why."""


def safetensors_bytes(tensors):
    """{name: array} as a safetensors file, names in alphabetical order (the library's own order is not fixed)."""
    header, data = {}, []
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        start = sum(map(len, data))
        data.append(array.astype(array.dtype.newbyteorder("<")).tobytes())
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(np.shape(tensors[name])),
            "data_offsets": [start, start + len(data[-1])],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


def npy_bytes(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def read_safetensors(path):
    """{name: array}. Raises NotTensors."""
    try:
        return load_tensors(path.read_bytes())
    except OSError as error:
        raise NotTensors(f"{path} cannot be read ({error.strerror})") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotTensors(f"{path} cannot be read as safetensors ({error})") from None


def read_npy(path):
    """An array. Raises NotTensors."""
    try:
        with open(path, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        raise NotTensors(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, EOFError, SyntaxError) as error:
        raise NotTensors(f"{path} cannot be read as .npy ({' '.join(str(error).split())[:120]})") from None


def sha256(data):
    return hashlib.sha256(data).hexdigest()
