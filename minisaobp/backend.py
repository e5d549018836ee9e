"""Arrays: which library they belong to, how they come in from outside, and what an attention matrix must be.

No global switch: every function asks its own arguments for their library (`xp`), so the same code runs on NumPy
and on CuPy, and a call never moves data between the two.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

FLOATS = ("float16", "float32", "float64")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
PIECE = 1 << 18  # numbers of one array that a thread works on at a time: 1 MiB in float32, which caches hold


def _start_threads():
    global _threads
    _threads = ThreadPoolExecutor(CORES, thread_name_prefix="minisaobp")


_start_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_threads)  # a forked process inherits the pool but none of its threads


def array_namespace(*arrays):
    """The library of the arrays: cupy if one of them is a CuPy array, numpy otherwise."""
    if any(type(array).__module__.partition(".")[0] == "cupy" for array in arrays):
        return sys.modules["cupy"]
    return np


class NoGpu(ValueError):
    """A GPU was asked for and there is none that can be used; says what was found."""


def library(device):
    """numpy for "cpu", cupy for "gpu", and for "auto" cupy if it has a usable GPU. Raises NoGpu."""
    if device == "cpu":
        return np
    found = _gpu_trouble()
    if found is None:
        return sys.modules["cupy"]
    if device == "auto":
        return np
    raise NoGpu(f"{found}; a GPU needs an NVIDIA driver and pip install -e .[cuda12] or .[cuda13]")


def _gpu_trouble():
    """What stands in the way of a GPU, None if nothing does. That CuPy can be imported says nothing about a GPU."""
    try:
        import cupy
    except Exception as error:  # of CUDA's libraries too: CuPy loads them when it is imported, or when it is asked
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return "CuPy is not installed"
        return f"CuPy cannot be imported ({_in_one_line(error.__cause__ or error)})"  # CuPy's own is a page of advice
    version = getattr(cupy, "__version__", "without a version")  # a folder of that name can be imported too
    try:
        if cupy.cuda.is_available():
            return None
        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy {version} finds no usable GPU ({_in_one_line(error)})"
    return f"CuPy {version} finds no GPU"


def _in_one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def is_out_of_memory(error):
    """Whether an exception says that there is too little memory: Python's and CuPy's do so as MemoryError, CUDA and its
    libraries, which take what they need for themselves, in errors of their own."""
    of_cuda = type(error).__module__.startswith("cupy")
    return isinstance(error, MemoryError) or (
        of_cuda and re.search("MemoryAllocation|OUT_OF_MEMORY|ALLOC(ATION)?_FAILED", str(error)) is not None
    )


def generator(xp, *seeds):
    """A generator of the library's random numbers that depends on the whole numbers `seeds` alone."""
    if xp is np:
        return np.random.default_rng(seeds)
    state = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return xp.random.Generator(xp.random.Philox4x3210(state))


def to_host(array):
    """The same numbers as a NumPy array."""
    return array.get() if array_namespace(array) is not np else np.asarray(array)


def as_array(x, name):
    """A NumPy or CuPy array as it is; anything else that speaks DLPack as a NumPy array.

    Raises TypeError that names the argument if it is neither, or cannot be exported (a tensor that requires grad,
    a tensor on a device that NumPy cannot read).
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask of its own, got {type(x).__name__}")
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x)  # np.matrix and its like calculate otherwise
    if array_namespace(x) is not np:
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name}: expected a NumPy, CuPy or DLPack array, got {type(x).__name__}")
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: this {type(x).__name__} cannot be read as a NumPy array ({error})") from None


def attention_array(A, name="A"):
    """A as a checked array of shape (…, L, L): floating point, finite, not negative. Rows need not sum to 1.

    Raises TypeError or ValueError that names the argument, what was given and what was expected.
    """
    A = as_array(A, name)
    if A.dtype.name not in FLOATS:
        raise TypeError(f"{name}: expected float16, float32 or float64, got {A.dtype} of shape {A.shape}")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., L, L) with L >= 1, got {A.shape}")
    if not A.size:
        return A
    highest = A.max()
    if not (A.min() >= 0 and highest < np.inf):  # a NaN fails the first comparison
        xp = array_namespace(A)
        bad = to_host(xp.argwhere(~((A >= 0) & (A < np.inf)))[0])
        where = tuple(int(i) for i in bad)
        raise ValueError(f"{name}: expected finite values >= 0, got {float(A[where])} at {where}, shape {A.shape}")
    largest = np.finfo(np.promote_types(A.dtype, np.float32)).max / A.shape[-1]
    if not highest <= largest:
        raise ValueError(f"{name}: expected row sums that {A.dtype} can hold, got entries up to {float(highest):g}")
    return A


def valid_array(valid, A):
    """`valid` as a boolean array of shape (…, L) that broadcasts against the rows of A, or None."""
    if valid is None:
        return None
    valid = as_array(valid, "valid")
    if valid.dtype != bool:
        raise TypeError(f"valid: expected booleans (False marks padding), got {valid.dtype} of shape {valid.shape}")
    try:
        fits = valid.ndim >= 1 and np.broadcast_shapes(valid.shape, A.shape[:-1]) == A.shape[:-1]
    except ValueError:
        fits = False
    if not fits or valid.shape[-1] != A.shape[-1]:
        raise ValueError(
            f"valid: expected shape (..., {A.shape[-1]}) that fits A of shape {A.shape}, got {valid.shape}"
        )
    return valid


def row_sum(x):
    """Sum along the last axis, kept: (..., L) -> (..., 1)."""
    return array_namespace(x).einsum("...k->...", x)[..., None]  # on short rows four times as fast as x.sum


def row_dot(x, y):
    """Sum of x * y along the last axis, kept: (..., L) -> (..., 1), without the product as an array."""
    xp = array_namespace(x)
    return (np.vecdot(x, y) if xp is np else xp.einsum("...k,...k->...", x, y))[..., None]


def in_pieces(work, stack, whole=False):
    """Call work(slice) on pieces of `stack` along its first axis, in threads; on CuPy, or if `whole`, once for all.

    NumPy lets go of the interpreter inside each operation, so threads share the cores. The pieces depend on the sizes
    alone, so results do not depend on the number of cores.
    """
    count = len(stack)
    step = max(1, PIECE // max(1, stack[:1].size))
    if not stack.size:
        return
    if whole or count <= step or array_namespace(stack) is not np:
        work(slice(0, count))
        return
    pieces = [slice(a, a + step) for a in range(0, count, step)]

    def work_through(some):
        for piece in some:
            work(piece)

    # neighbouring pieces to one thread, the first of them to this one: handing over costs more than a small piece
    share = -(-len(pieces) // CORES)
    others = [_threads.submit(work_through, pieces[a : a + share]) for a in range(share, len(pieces), share)]
    try:
        work_through(pieces[:share])
    finally:
        for other in others:
            other.result()  # an exception in a piece is raised here
