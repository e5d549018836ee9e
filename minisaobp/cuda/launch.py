"""Compiling and launching the kernels of this folder's .cu files."""

import functools
from pathlib import Path

import numpy as np

WARPS = 8  # rows that one block works on
_FILES = ("common.cu", "attention.cu", "attention_long.cu", "operations.cu")
_SOURCE = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES)


def cupy_library():
    """CuPy, imported where it is needed: this package is imported where there is none."""
    import cupy

    return cupy


def in_order(*arrays):
    """The arrays as the kernels read them: without gaps, in C's order."""
    return [a if a.flags.c_contiguous else cupy_library().ascontiguousarray(a) for a in arrays]


@functools.cache
def _module(dtype, items):
    """The kernels for one dtype and for rows of at most 32 * items numbers, which a warp keeps in registers."""
    # NumPy's letters for dtypes: to ask for a name takes longer than to launch a kernel
    real = {"f": "float", "d": "double"}[dtype]
    limits = np.finfo(dtype)
    lost = f"((REAL){float(limits.tiny) / float(limits.eps) ** 2!r})"
    defines = {"REAL": real, "SINGLE": int(real == "float"), "ITEMS": items, "WARPS": WARPS, "LOST": lost}
    head = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    return cupy_library().RawModule(code=head + _SOURCE, options=("--std=c++14",))


@functools.cache
def _function(name, dtype, items, device):
    """device: the current one where that is asked something of its own, else None."""
    function = _module(dtype, items).get_function(name)
    if device is not None:
        # clusters of more than 8 blocks want to be asked for
        allowed = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, which CuPy has no name for
        cupy_library().cuda.driver.funcSetAttribute(function.kernel.ptr, allowed, 1)
    return function


@functools.cache
def items_of(width):
    """How many numbers of a row of this width a lane holds: a power of two."""
    return max(1, 1 << (-(-width // 32) - 1).bit_length())


def kernel(name, array, width=32):
    """The kernel for the array's dtype and for rows of `width` numbers."""
    items, device = items_of(width), None
    if items > 8 and name.endswith("in_registers"):
        device = cupy_library().cuda.runtime.getDevice()
    return _function(name, array.dtype.char, items, device)


def by_rows(name, array, arguments, rows, width):
    """Launch a kernel in which a warp works on a row."""
    kernel(name, array, width)(((rows + WARPS - 1) // WARPS,), (32 * WARPS,), arguments)


@functools.cache
def has_clusters(device):
    """Whether blocks of this device read each other's shared memory: compute capability 9.0 or later."""
    return int(cupy_library().cuda.Device(device).compute_capability) >= 90
