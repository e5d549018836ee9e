"""A stand-in for CuPy whose arrays are NumPy's and whose kernels run on the processor: as much of it as minisaobp.cuda
asks for. Source text is rewritten for g++, compiled with emulator.h and called.

Every launch runs twice, the first warp first and the last warp first, and has to leave the same bits: it does not where
a barrier is missing. New arrays, and what lies around an array, are full of NaN.
"""

import ctypes
import functools
import hashlib
import math
import re
import subprocess
import types
from pathlib import Path

import numpy as np

HEADER = Path(__file__).with_name("emulator.h")
folder = None  # where the rewritten source and what is compiled of it go
architecture = 900  # the __CUDA_ARCH__ of the GPU
device = 0  # the number of the current GPU


class EmulatorError(Exception):
    """What no kernel may do, or what the emulator does not know."""


# ---- source text ----------------------------------------------------------------------------------------------------

# the asm of the kernels, and what it is in C++; {0} is its first operand
ASM = {
    "": "",
    "ex2.approx.ftz.f32 %0, %1;": "{0} = ex2_approx_ftz({1});",
    "rcp.approx.ftz.f32 %0, %1;": "{0} = rcp_approx_ftz({1});",
    "barrier.cluster.arrive.release.aligned;\\n\\tbarrier.cluster.wait.acquire.aligned;": "CLUSTER_BARRIER;",
    "mapa.shared::cluster.u32 %0, %1, %2;": "{0} = emulator::address_in_block({1}, {2});",
    "ld.shared::cluster.f64 %0, [%1];": "{0} = emulator::shared_double({1});",
    "st.shared::cluster.f64 [%0], %1;": "emulator::shared_double({0}) = {1};",
}
KINDS = {"float": "f4", "double": "f8", "int": "i4", "long long": "i8", "mask_t": "u1"}  # NumPy's names for types


def _asm(match):
    template, operands = re.fullmatch(r'\s*"([^"]*)"(.*)', match[1], re.DOTALL).groups()
    if template not in ASM:
        raise EmulatorError(f"asm that the emulator does not know: {template!r}")
    return ASM[template].format(*re.findall(r'"[=+]?\w"\s*(\((?:[^()]|\([^()]*\))*\))', operands))


def _parameter(text):
    """A kernel's parameter: f4, i8 .. for a number, Pf4 for a pointer to such, P for one to anything else."""
    kind, star = re.fullmatch(r"(.+?)\s*(\*?)\s*\w+", re.sub(r"\b(const|__restrict__)\b", "", text).strip()).groups()
    return f"P{KINDS.get(kind, '')}" if star else KINDS[kind]


def _output(command, text=None):
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")
    return done.stdout


@functools.cache
def translate(code, architecture):
    """C++ for the text of CUDA kernels; {name: (number, parameters)} of these."""
    text = _output(["g++", "-E", "-P", "-x", "c++", f"-D__CUDA_ARCH__={architecture}", "-"], code)
    text = re.sub(r"\basm\s*(?:volatile\s*)?\((.*?)\)\s*;", _asm, text, flags=re.DOTALL)
    text = re.sub(
        r"\b__shared__ (\w+) (\w+)([^;]*);", r"auto& \2 = emulator::shared_variable<\1\3>(__COUNTER__);", text
    )
    cluster, bounds = r"(?:__cluster_dims__\((.*?), 1, 1\)\s*)?", r"(?:__launch_bounds__\([^()]*\)\s*)?"
    heads = re.findall(rf'extern "C" __global__ void\s+{cluster}{bounds}(\w+)\(([^)]*)\)', text)
    if len(heads) != text.count("__global__"):
        raise EmulatorError("a kernel whose head the emulator does not know")
    table = "".join(
        f"{{{cluster or 1}, [](void** values) {{ emulator::call_with({name}, values); }}}},\n"
        for cluster, name, _ in heads
    )
    text = f'#include "{HEADER.name}"\n{text}\nconst emulator::Kernel emulator::kernels[] = {{\n{table}}};\n'
    return text, {name: (n, [*map(_parameter, list_.split(","))]) for n, (_, name, list_) in enumerate(heads)}


@functools.cache
def compiled(text):
    """The library of a translated text."""
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    source, library = (folder / f"{name}{suffix}" for suffix in (".cpp", ".so"))
    source.write_text(text, encoding="utf-8")
    # fused products as a GPU has them, where the processor does; -O1 alone makes none
    flags = ["-std=c++17", "-O1", "-w", "-fno-strict-aliasing", "-march=native", "-fexpensive-optimizations"]
    flags += ["-ffp-contract=fast", "-U_FORTIFY_SOURCE"]  # which would forbid to jump from stack to stack
    _output(["g++", *flags, "-shared", "-fPIC", f"-I{HEADER.parent}", source, "-o", library])
    library = ctypes.CDLL(str(library))
    library.launch.restype = ctypes.c_char_p
    return library


# ---- kernels --------------------------------------------------------------------------------------------------------


class RawModule:
    def __init__(self, code, options=()):
        self._text, self._kernels = translate(code, architecture)
        self._library = compiled(self._text)

    def get_function(self, name):
        return RawKernel(self._library, self._text.splitlines(), name, *self._kernels[name])


class _Dim3(ctypes.Structure):
    _fields_ = tuple((axis, ctypes.c_uint) for axis in "xyz")


class RawKernel:
    """Called as CuPy's: (grid, block, arguments)."""

    def __init__(self, library, lines, name, number, parameters):
        self._library, self._lines = library, lines
        self.name, self._number, self._parameters = name, number, parameters
        self._large_clusters = set()  # the devices on which they are allowed
        self.kernel = types.SimpleNamespace(ptr=self)  # for funcSetAttribute

    def allow(self, attribute, value):
        if attribute == 14:  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            self._large_clusters |= {device} if value else set()

    def __call__(self, grid, block, args):
        kinds = [_kind(arg) for arg in args]
        for n, arg in enumerate(args):
            if isinstance(arg, np.ndarray) and not arg.flags.c_contiguous:
                raise EmulatorError(f"{self.name}: argument {n} is not in C order: its strides are {arg.strides}")
        pairs = zip(kinds, self._parameters, strict=True)
        # "P": a null pointer, of any kind; or a parameter that points to a struct, for which any array will do
        if not all(a == b or (a[0] == b[0] == "P" and "P" in (a, b)) for a, b in pairs):
            raise EmulatorError(f"{self.name}: takes {self._parameters}, got {kinds}")
        first, second = (self._launch(grid, block, args, backwards) for backwards in (False, True))
        for arg, a, b in zip(args, first, second, strict=True):
            if isinstance(arg, np.ndarray):
                if a.tobytes() != b.tobytes():
                    raise EmulatorError(f"{self.name}: a race: what it leaves depends on which warps go first")
                arg[...] = a

    def _launch(self, grid, block, args, backwards):
        """Run it on copies of the arrays, on one where two arguments are one array. -> the copy for each argument"""
        copies = {_address(arg): _Guarded(arg) for arg in args if isinstance(arg, np.ndarray)}
        mine = [copies[_address(arg)] if isinstance(arg, np.ndarray) else None for arg in args]
        values = [np.asarray(arg if copy is None else copy.address) for arg, copy in zip(args, mine, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*map(_address, values))
        sizes = (_Dim3(*map(int, (*size, 1, 1)[:3])) for size in (grid, block))
        large_clusters = device in self._large_clusters
        trouble = self._library.launch(self._number, *sizes, pointers, backwards, large_clusters).decode()
        if trouble:  # lines that it names are quoted
            quoted = re.sub(r"line (\d+)", lambda at: f"{at[0]} `{self._lines[int(at[1]) - 1].strip()}`", trouble)
            raise EmulatorError(f"{self.name}: {quoted}")
        for number, copy in enumerate(mine):
            if copy is not None and copy.overrun():
                raise EmulatorError(f"{self.name}: a write outside the array of argument {number}")
        return [None if copy is None else copy.array for copy in mine]


def _kind(arg):
    if isinstance(arg, np.ndarray):
        return f"P{arg.dtype.kind}{arg.itemsize}"
    if type(arg) is int and arg == 0:
        return "P"
    if not isinstance(arg, np.generic):
        raise EmulatorError(f"an argument whose size is not clear: {arg!r}")
    return f"{arg.dtype.kind}{arg.itemsize}"


def _address(array):
    return array.__array_interface__["data"][0]


class _Guarded:
    """A copy of an array amid NaN, as far from a multiple of 16 bytes as the array itself."""

    MARGIN = 1 << 13

    def __init__(self, array):
        around = np.full(array.nbytes + 2 * self.MARGIN + 16, 0xFF, np.uint8)
        start = self.MARGIN + (_address(array) - _address(around) - self.MARGIN) % 16
        self._sides = around[:start], around[start + array.nbytes :]
        self.array = around[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.address = np.uint64(_address(around) + start)

    def overrun(self):
        return not all((side == 0xFF).all() for side in self._sides)


class ElementwiseKernel:
    """One expression for each element; `T x` and `float64 y` are its parameters, i is the element's number."""

    def __init__(self, inputs, outputs, operation, name):
        self._inputs, self._outputs = ([p.split() for p in text.split(",")] for text in (inputs, outputs))
        self._operation, self._name = operation, name

    def __call__(self, *args):
        T = next(arg.dtype for arg in args if isinstance(arg, ndarray))
        shape = np.broadcast_shapes(*(np.shape(arg) for arg in args))
        arrays = [empty(shape, T if kind == "T" else kind) for kind, _ in self._inputs]
        for array, arg in zip(arrays, args, strict=False):
            array[...] = arg
        results = args[len(arrays) :] or tuple(empty(shape, T) for _ in self._outputs)
        real = {"f": "float", "d": "double"}[T.char]
        names = {"T": real, "float64": "double", "int64": "long long"}
        pointers = ", ".join(f"{names[kind]}* all_{name}" for kind, name in self._inputs + self._outputs)
        values = [f"{names[kind]} {name} = all_{name}[i];" for kind, name in self._inputs]
        values += [f"{real}& {name} = all_{name}[i];" for _, name in self._outputs]
        code = f"""
            typedef {real} T;
            extern "C" __global__ void {self._name}(long long count, {pointers}) {{
                long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
                if (i >= count) return;
                {" ".join(values)}
                {self._operation};
            }}"""
        count = math.prod(shape)
        kernel = RawModule(code).get_function(self._name)
        kernel((-(-count // 128),), (128,), (np.int64(count), *arrays, *results))
        return results if len(results) > 1 else results[0]


# ---- arrays ---------------------------------------------------------------------------------------------------------


class ndarray(np.ndarray):
    @property
    def data(self):
        return types.SimpleNamespace(ptr=_address(self))


ndarray.__module__ = "cupy"  # by which minisaobp knows whose arrays they are


def empty(shape, dtype=float):
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    return array.view(ndarray)


class _Device:
    def __init__(self, number):
        self.compute_capability = str(architecture // 10)


def _of_numpy(name):
    return lambda *args, **options: getattr(np, name)(*args, **options).view(ndarray)


def module():
    """What `import cupy` is to find."""
    cupy = types.ModuleType("cupy")
    for name in ("arange", "argsort", "ascontiguousarray", "broadcast_to", "exp", "expm1", "full", "zeros"):
        setattr(cupy, name, _of_numpy(name))
    cupy.ndarray, cupy.RawModule, cupy.ElementwiseKernel = ndarray, RawModule, ElementwiseKernel
    cupy.empty, cupy.empty_like = empty, lambda a: empty(a.shape, a.dtype)
    cupy.asarray = lambda a: np.array(a).view(ndarray)
    driver = types.SimpleNamespace(funcSetAttribute=RawKernel.allow)
    runtime = types.SimpleNamespace(getDevice=lambda: device)
    cupy.cuda = types.SimpleNamespace(Device=_Device, driver=driver, runtime=runtime)
    return cupy
