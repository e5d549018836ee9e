"""Speed and memory, as medians beside their spread and as ratios to a peer that runs in the same process.

Machines are shared and noisy: what is compared takes turns, call by call, so that a slow minute slows all of it.
"""

import statistics
import subprocess
import sys
import time

import numpy as np

from . import bp
from .files import write_json
from .results import environment

REPEATS = 40
STREAMING = (16384, 64)  # tokens, head width


def take_turns(functions, repeats):
    """{name: seconds of each call} of {name: function}, one call of each in turn."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            time.sleep(0.01)  # the worker threads of a peer spin for a few milliseconds after their work
            started = time.perf_counter()
            function()
            if turn >= 2:  # the first two warm up caches and allocators
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds):
    """{median, quartiles} in seconds of a list of measurements."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median": median, "quartiles": [low, high]}


def bench_bp(out):
    """Refinement at (32, 4, 128, 128) float32 against the same formula in PyTorch; streaming's memory; the loops."""
    rng = np.random.default_rng(0)
    A = np.exp(2 * rng.standard_normal((32, 4, 128, 128))).astype(np.float32)
    A /= A.sum(-1, keepdims=True)
    dB = rng.standard_normal(A.shape).astype(np.float32)
    contestants = {
        "copy of A": lambda: A.copy(),
        "refine": lambda: bp.refine(A, 0.2),
        "refine, causal": lambda: bp.refine(A, 0.2, causal=True),
        "refine_vjp (forward and backward)": lambda: bp.refine_vjp(A, 0.2, dB),
        "refine_vjp, causal": lambda: bp.refine_vjp(A, 0.2, dB, causal=True),
    } | _naive_pytorch(A, dB)
    seconds = {name: summary(values) for name, values in take_turns(contestants, REPEATS).items()}
    results = {"environment": environment(), "shape": list(A.shape), "dtype": "float32", "repeats": REPEATS}
    results["refinement"] = seconds

    small = A[0, 0, :64, :64].astype(np.float64)
    started = time.perf_counter()
    bp.algorithm1(small, 0.2)
    loops = time.perf_counter() - started
    vectorised = summary(take_turns({"refine": lambda: bp.refine(small, 0.2)}, REPEATS)["refine"])["median"]
    results["algorithm1"] = {"length": 64, "seconds": loops, "seconds_refine": vectorised}
    results["streaming"] = _streaming_memory()

    print(f"Refinement of {A.shape} float32 ({A.nbytes / 1e6:.1f} MB), milliseconds, {REPEATS} turns")
    peers = {"refine": "PyTorch", "refine_vjp (forward and backward)": "PyTorch, forward and backward"}
    for name, row in seconds.items():
        peer = seconds.get(peers.get(name))
        ratio = f"   {row['median'] / peer['median']:.2f} of PyTorch" if peer else ""
        low, high = (1e3 * q for q in row["quartiles"])
        print(f"{name:>34}  {1e3 * row['median']:7.2f}  ({low:.2f} to {high:.2f}){ratio}")
    copy = seconds["copy of A"]["median"]
    print(
        f"Floor: reading A and writing B once, {2 * A.nbytes / 1e6:.1f} MB, is the copy: {1e3 * copy:.2f} ms; "
        f"refine takes {seconds['refine']['median'] / copy:.1f} of it"
    )
    print(f"Algorithm 1 in loops, L = 64: {loops:.2f} s, {loops / vectorised:,.0f} times refine")
    streaming = results["streaming"]
    print(
        f"Streaming attention, L = {STREAMING[0]}, width {STREAMING[1]}, one head, forward and backward: "
        f"{streaming['seconds']:.1f} s, peak resident memory {streaming['peak_megabytes']:.0f} MB "
        f"(one L x L array: {STREAMING[0] ** 2 * 4 / 1e6:.0f} MB)"
    )
    write_json(out, results)
    print(f"Wrote {out}")


def _naive_pytorch(A, dB):
    """The formula as one would write it: M = e^lam S + (1 - e^lam) A, prod, divide, normalise; autograd backward."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: no peer to compare with")
        return {}
    peer, upstream = torch.from_numpy(A), torch.from_numpy(dB)
    lam = torch.tensor(0.2)

    def naive(A, lam):
        S = A.sum(-1, keepdim=True)
        M = torch.exp(lam) * S + (1 - torch.exp(lam)) * A
        B = A * M.prod(-2, keepdim=True) / M
        return B / B.sum(-1, keepdim=True)

    def forward():
        with torch.no_grad():
            naive(peer, lam)

    def forward_and_backward():
        x, y = peer.detach().requires_grad_(), lam.detach().requires_grad_()
        naive(x, y).backward(upstream)

    return {"PyTorch": forward, "PyTorch, forward and backward": forward_and_backward}


_STREAMING_RUN = """
import re, resource, sys, time
import numpy as np
import minisaobp as ms
L, E = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
Q, K, V, dO = (rng.standard_normal((L, E), np.float32) for _ in range(4))
started = time.perf_counter()
O, cache = ms.streaming_attention(Q, K, V, 0.2)
gradients = ms.streaming_attention_backward(dO, cache)
seconds = time.perf_counter() - started
try:  # the peak of this program alone; ru_maxrss can be that of the process it was forked from
    with open("/proc/self/status") as file:
        peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(seconds, peak / 1e6)
"""


def _streaming_memory():
    """Seconds and peak resident memory of a process that does nothing else."""
    command = [sys.executable, "-c", _STREAMING_RUN, *map(str, STREAMING)]
    seconds, megabytes = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "length": STREAMING[0],
        "width": STREAMING[1],
        "seconds": float(seconds),
        "peak_megabytes": float(megabytes),
    }
