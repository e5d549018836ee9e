"""What is said where there is no GPU, or a CuPy that cannot use it: one line, by every command that computes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from minisaobp import cuda
from minisaobp.commands.options import device_library

ROOT = Path(__file__).parents[1]
NEEDS = "a GPU needs an NVIDIA driver and pip install -e .[cuda12] or .[cuda13]"
CUDA = """
import types
class CUDARuntimeError(RuntimeError): pass
def fail(): raise {error}
__version__ = "14.0"
runtime = types.SimpleNamespace(CUDARuntimeError=CUDARuntimeError, getDeviceCount={count})
cuda = types.SimpleNamespace(is_available={available}, runtime=runtime)
"""
NO = {"available": "lambda: False", "error": "CUDARuntimeError('cudaErrorInsufficientDriver: too old')"}
OF_PAGES = """
try:
    import a_library_of_cuda
except ImportError as error:
    raise ImportError("====\\nFailed to import CuPy.\\n====") from error
"""
BROKEN = {  # cupy/__init__.py, or None for a folder without it; and what was found
    "raise ModuleNotFoundError('no', name='cupy')": "CuPy is not installed",
    "raise ImportError('libcublas.so:\\n not there')": "CuPy cannot be imported (ImportError: libcublas.so: not there)",
    OF_PAGES: "CuPy cannot be imported (ModuleNotFoundError: No module named 'a_library_of_cuda')",
    "raise OSError('libcudart.so')": "CuPy cannot be imported (OSError: libcudart.so)",
    None: "CuPy without a version finds no usable GPU (AttributeError: module 'cupy' has no attribute 'cuda')",
    CUDA.format(count="lambda: 0", **NO): "CuPy 14.0 finds no GPU",
    CUDA.format(count="fail", **NO): "finds no usable GPU (CUDARuntimeError: cudaErrorInsufficientDriver: too old)",
    CUDA.format(available="fail", count="fail", error="RuntimeError('no libcudart.so')"): "(RuntimeError: no libcudart",
}


def run(folder, source, *arguments):
    (folder / "cupy").mkdir()
    if source is not None:
        (folder / "cupy" / "__init__.py").write_text(source)
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment, timeout=120)


@pytest.mark.parametrize("source", BROKEN, ids=[str(n) for n in range(len(BROKEN))])
def test_what_stands_in_the_way_of_a_gpu_is_said_in_one_line(tmp_path, source):
    asked = (
        "from minisaobp.backend import NoGpu, library\n"
        "assert library('auto').__name__ == 'numpy'\n"
        "try: library('gpu')\n"
        "except NoGpu as trouble: print(trouble)"
    )
    done = run(tmp_path, source, "-c", asked)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert BROKEN[source] in line and line.endswith(f"; {NEEDS}"), line


COMMANDS = {
    "compare": [],
    "train": ["--corpus", "text.txt"],
    "pretrain": ["--preset", "bert-mini", "--corpus", "text.txt"],
    "finetune": ["--task", "cola", "--data", ".", "--checkpoint", "model"],
    "sweep": [ROOT / "data/results/decoder/config.toml", "--check"],
    "evaluate": ["--checkpoint", "model"],
    "generate": ["--checkpoint", "model", "--prompt", "x"],
    "diagnose": ["--checkpoint", "model"],
    "bench": ["cost"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_computes_refuses_a_gpu_that_is_not_there(tmp_path, command):
    source = next(iter(BROKEN))  # not installed
    done = run(tmp_path, source, "-m", "minisaobp", command, *COMMANDS[command], "--device", "gpu")
    wanted = f"python -m minisaobp {command}: error: argument --device: CuPy is not installed; {NEEDS}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", wanted)


@pytest.mark.parametrize("precision,wanted", [("float32", "0"), ("tf32", "1")])
def test_the_precision_is_that_of_the_option_whatever_the_environment_says(monkeypatch, precision, wanted):
    monkeypatch.setenv("CUPY_TF32", "1")
    allowed = []
    cupy = SimpleNamespace(__name__="cupy", cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cuda, "allow_tf32", lambda: allowed.append(True))
    assert device_library(SimpleNamespace(device="gpu", precision=precision), pytest.fail) is cupy
    assert (os.environ["CUPY_TF32"], len(allowed)) == (wanted, int(wanted))
