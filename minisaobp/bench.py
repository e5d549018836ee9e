"""Speed and memory, as medians beside their spread and as ratios to a peer that runs in the same process.

Machines are shared and noisy: what is compared takes turns, call by call, so that a slow minute slows all of it.
"""

import re
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from . import bp
from .files import write_json
from .nn import Bert, preset
from .results import provenance
from .training.adamw import AdamW, clip_to_norm

REPEATS = 40
STREAMING = (16384, 64)  # tokens, head width
BATCH, LENGTH, VOCABULARY = 16, 128, 8192  # of the training step
MASKED = 0.15


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
    results = {**provenance(), "shape": list(A.shape), "dtype": "float32", "repeats": REPEATS}
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


# ---- a training step ------------------------------------------------------------------------------------------------


def bench_train(out):
    """One step (forward, backward, clipping, AdamW) of BERT-Mini beside transformers' BertForMaskedLM, eager."""
    ids, labels, mask = training_batch()
    contestants = {"matrix products alone": matrix_products(int((labels != -100).sum()))}
    for name, variant, dropout in STEPS:
        contestants[name] = our_step(variant, dropout, ids, labels, mask)
    contestants |= _transformers_steps(ids, labels, mask)
    seconds = {name: summary(values) for name, values in take_turns(contestants, TRAIN_REPEATS).items()}
    memory = {name: _step_memory(name) for name in contestants if name != "matrix products alone"}
    results = {
        **provenance(),
        "model": "bert-mini",
        "vocabulary": VOCABULARY,
        "batch": [BATCH, LENGTH],
        "labels": int((labels != -100).sum()),
        "dtype": "float32",
        "repeats": TRAIN_REPEATS,
        "seconds": seconds,
        "memory": memory,
    }

    print(f"BERT-Mini, vocabulary {VOCABULARY}, batch {BATCH} x {LENGTH}, float32, one training step, milliseconds")
    print(f"{TRAIN_REPEATS} turns, median (quartiles); memory: peak of a process of its own, and what the step adds\n")
    for name, row in seconds.items():
        low, high = (1e3 * q for q in row["quartiles"])
        line = f"{name:>36}  {1e3 * row['median']:7.1f}  ({low:.1f} to {high:.1f})"
        if name in memory:
            line += f"   {memory[name]['peak_megabytes']:5.0f} MB, {memory[name]['step_megabytes']:5.0f} MB"
        print(line)
    median = {name: row["median"] for name, row in seconds.items()}
    floor = median["matrix products alone"]
    print(f"\nThe step takes {median['original'] / floor:.2f} times its floor, its matrix products alone")
    print(f"high: {median['high'] / median['original']:.3f} times original")
    for ours, theirs in (("original", "transformers"), ("original, dropout 0.1", "transformers, dropout 0.1")):
        if theirs in median:
            print(f"{ours}: {median[theirs] / median[ours]:.2f} times as fast as {theirs}")
    write_json(out, results)
    print(f"Wrote {out}")


TRAIN_REPEATS = 15
STEPS = (("original", "original", 0.0), ("high", "high", 0.0), ("original, dropout 0.1", "original", 0.1))


def training_batch():
    """ids, labels and attention mask, random: 15% of the tokens have a label."""
    rng = np.random.default_rng(0)
    ids = rng.integers(5, VOCABULARY, (BATCH, LENGTH))
    return ids, np.where(rng.random(ids.shape) < MASKED, ids, -100), np.ones(ids.shape, int)


def our_step(variant, dropout, ids, labels, mask):
    config = preset(
        "bert-mini",
        VOCABULARY,
        attention_variant=variant,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return step_of(config, ids, labels, mask)


def step_of(config, ids, labels, mask=None, xp=np):
    """A function that does one training step of an encoder; on a GPU without dropout."""
    model = Bert.initialise(config, np.random.default_rng(0)).on(xp)
    optimiser, rng = AdamW.for_parameters(model.parameters), np.random.default_rng(1) if xp is np else None

    def step():
        _, gradients = model.loss_and_gradients(ids, labels, mask, rng=rng)
        clip_to_norm(gradients.flat, 1.0)
        optimiser.update(model.parameters.flat, gradients.flat, 1e-4)

    return step


def _transformers_steps(ids, labels, mask):
    try:
        import torch
        import transformers
    except ImportError:
        print("PyTorch and transformers are not installed: no peer to compare with")
        return {}
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    tensors = {name: torch.from_numpy(array) for name, array in tensors.items()}

    def step_of(dropout):
        ours = preset("bert-mini", VOCABULARY)
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = transformers.BertConfig(
            **{name: getattr(ours, name) for name in names},
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            attn_implementation="eager",
        )
        model = transformers.BertForMaskedLM(config).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

        def step():
            optimiser.zero_grad()
            model(**tensors).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

        return step

    return {"transformers": step_of(0.0), "transformers, dropout 0.1": step_of(0.1)}


def matrix_products(labels):
    """A function that does nothing but the matrix products of a step, forward and backward, each of its own shape."""
    config, rng = preset("bert-mini", VOCABULARY), np.random.default_rng(0)
    D, F, H, tokens = config.hidden_size, config.intermediate_size, config.num_attention_heads, BATCH * LENGTH
    linear = [(tokens, D, 3 * D), (tokens, D, D), (tokens, D, F), (tokens, F, D)] * config.num_hidden_layers
    linear += [(labels, D, D), (labels, D, VOCABULARY)]
    arrays = {}
    for N, I, O in set(linear):
        arrays[N, I, O] = [rng.standard_normal(s, np.float32) for s in ((N, I), (O, I), (N, O))]
    wide = rng.standard_normal((BATCH, H, LENGTH, LENGTH), np.float32)
    narrow = rng.standard_normal((BATCH, H, LENGTH, D // H), np.float32)

    def products():
        for shape in linear:
            x, W, dy = arrays[shape]
            _ = x @ W.T, dy @ W, dy.T @ x
        for _ in range(2 * config.num_hidden_layers):  # q k^T and A v, and the two gradients of each
            _ = narrow @ narrow.swapaxes(-1, -2), wide @ narrow, wide.swapaxes(-1, -2) @ narrow

    return products


_STEP_RUN = """
import sys
from minisaobp import bench
name = sys.argv[1]
batch = bench.training_batch()
ours = {n: (variant, dropout) for n, variant, dropout in bench.STEPS}
step = bench.our_step(*ours[name], *batch) if name in ours else bench._transformers_steps(*batch)[name]
before = bench.resident("VmRSS")
for _ in range(3):
    step()
peak = bench.resident("VmHWM")
print(peak / 1e6, (peak - before) / 1e6)
"""


def _step_memory(name):
    """Peak resident memory of a process that does three such steps, and how much more than before them."""
    command = [sys.executable, "-c", _STEP_RUN, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {"peak_megabytes": float(done[-2]), "step_megabytes": float(done[-1])}


def resident(what):
    """Bytes of this process in memory now (VmRSS) or at its peak (VmHWM)."""
    try:  # of this program alone; ru_maxrss can be that of the process it was forked from
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"{what}:\s+(\d+)", file.read())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- streaming's memory ---------------------------------------------------------------------------------------------

_STREAMING_RUN = """
import sys, time
import numpy as np
import minisaobp as ms
from minisaobp.bench import resident
L, E = map(int, sys.argv[1:])
rng = np.random.default_rng(0)
Q, K, V, dO = (rng.standard_normal((L, E), np.float32) for _ in range(4))
started = time.perf_counter()
O, cache = ms.streaming_attention(Q, K, V, 0.2)
gradients = ms.streaming_attention_backward(dO, cache)
seconds = time.perf_counter() - started
print(seconds, resident("VmHWM") / 1e6)
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
