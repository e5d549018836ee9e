"""The GPU's benchmark: refinement against a copy, each kernel against the bytes it must move, and whole training steps,
beside PyTorch on the same device.

Times are of the device, between two of its events, with what is compared taking turns.
"""

import gc

import numpy as np

from . import cuda
from .bench import step_of, summary
from .bp import refine
from .bp.refinement import refine_rows
from .files import write_json
from .nn import ops, preset
from .nn.attention import refined_softmax, refined_softmax_backward
from .results import provenance
from .training.adamw import AdamW

SHAPES = ((32, 8, 512, 512), (128, 4, 128, 128))
STEPS = (("bert-mini", 128, 128), ("bert-medium", 32, 512))  # preset, sequences, tokens of each
VOCABULARY, LAM = 30522, 0.2
PEERS = ("eager", "compiled", "labelled")  # the last compiled too
REPEATS, STEP_REPEATS = 30, 12
CALLS = 20  # of a kernel between two events, so that what is measured is the device and not the launching


def bench_gpu(out, xp):
    """Print the tables and write them to `out` as JSON. xp: cupy, with TF32 as CUPY_TF32 says."""
    device = xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    versions = {
        "cupy": xp.__version__,
        "cuda": xp.cuda.runtime.runtimeGetVersion(),
        "driver": xp.cuda.runtime.driverGetVersion(),  # the newest CUDA that it knows
    }
    results = {**provenance(), "device": device, **versions, "refinement": {}, "steps": {}}
    # Ours come first: in a process that had compiled a model with PyTorch they took up to half as long again.
    batches = {step: _batch(*step[1:]) for step in STEPS}
    ours = {step: _our_steps(step[0], *batches[step], xp) for step in STEPS}
    results["kernels"] = _kernels(xp)
    torch, transformers = _peers()
    for shape in SHAPES:
        results["refinement"]["x".join(map(str, shape))] = _refinement(shape, xp, torch)
    xp.get_default_memory_pool().free_all_blocks()  # PyTorch's models want what ours and the kernels had
    for step in STEPS:
        name, batch, length = step
        rows = ours[step] | (_their_steps(name, *batches[step], xp, torch, transformers) if torch else {})
        _print_steps(name, batch, length, rows)
        results["steps"][f"{name} {batch}x{length}"] = rows
    write_json(out, results)
    print(f"Wrote {out}")


def _peers():
    """PyTorch and transformers, or None twice if either is missing, cannot be loaded beside CuPy or finds no GPU."""
    try:
        import torch
        import transformers
    except (ImportError, OSError) as error:  # OSError: of a library of CUDA's
        print(f"No PyTorch and transformers to compare with: {error}")
        return None, None
    if not torch.cuda.is_available():
        print(f"No PyTorch and transformers to compare with: PyTorch {torch.__version__} finds no GPU")
        return None, None
    torch.backends.cuda.matmul.allow_tf32 = True
    return torch, transformers


def take_turns(functions, repeats, xp, torch=None):
    """{name: milliseconds of each call} by events of the device; on PyTorch's stream if the name starts with that."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 3):
        for name, function in functions.items():
            if name.startswith("PyTorch"):
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                stop.record()
                torch.cuda.synchronize()
                taken = start.elapsed_time(stop)
            else:
                start, stop = xp.cuda.Event(), xp.cuda.Event()
                start.record()
                function()
                stop.record()
                stop.synchronize()
                taken = xp.cuda.get_elapsed_time(start, stop)
            if turn >= 3:
                times[name].append(taken)
    return times


def _refinement(shape, xp, torch):
    A = xp.exp(2 * xp.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    A /= A.sum(-1, keepdims=True)
    B = xp.empty_like(A)
    contestants = {
        "copy": lambda: xp.copyto(B, A),
        "refine": lambda: refine_rows(A, LAM, out=B),
        "refine, causal": lambda: refine_rows(A, LAM, causal=True, out=B),
        "minisaobp.refine": lambda: refine(A, LAM),  # looks at A first, and normalises its rows
    }
    if torch is not None:
        peer = torch.from_dlpack(A)
        compiled = torch.compile(_naive)
        lam = torch.tensor(LAM, device="cuda")
        contestants["PyTorch, naive"] = lambda: _naive(peer, lam)
        contestants["PyTorch, compiled"] = lambda: compiled(peer, lam)
    many = {name: _repeated(function) for name, function in contestants.items()}
    times = take_turns(many, REPEATS, xp, torch)
    rows = {name: summary([t / CALLS for t in values]) for name, values in times.items()}
    copy = rows["copy"]["median"]
    print(f"\nRefinement of {shape} float32, {A.nbytes / 1e6:.0f} MB, milliseconds; the floor reads and writes it once")
    for name, row in rows.items():
        row["of_copy"] = row["median"] / copy
        low, high = row["quartiles"]
        rate = 2 * A.nbytes / row["median"] / 1e9
        spread = f"({low:.4f} to {high:.4f})"
        print(
            f"{name:>20}  {row['median']:8.4f}  {spread}  {row['of_copy']:6.2f} copies  {rate:6.2f} TB/s"
            + _ratios(name, row, {peer: rows.get(f"PyTorch, {peer}") for peer in ("naive", "compiled")})
        )
    return rows


def _kernels(xp):
    """Every kernel at the sizes of BERT-Medium, 32 x 512 tokens or 8 x 1024, beside a copy of as many bytes."""
    rng = xp.random.default_rng(0)

    def drawn(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    B, H, L, D, F, asked = 32, 8, 512, 512, 2048, 2458
    scores, dB = drawn(B, H, L, L), drawn(B, H, L, L)
    x, gamma, beta, wide, bias = drawn(B * L, D), drawn(D), drawn(D), drawn(B * L, F), drawn(F)
    logits, labels, ids = (
        drawn(asked, VOCABULARY),
        rng.integers(0, VOCABULARY, asked),
        rng.integers(0, VOCABULARY, B * L),
    )
    weights, gradient = drawn(41_404_730), drawn(41_404_730)
    optimiser = AdamW(xp.zeros_like(weights), xp.zeros_like(weights), decayed=weights.size)
    _, norm = ops.layer_norm(x, gamma, beta, 1e-12)
    _, gelu = ops.gelu(wide)
    caches = {
        causal: {variant: refined_softmax(scores, LAM, variant, causal=causal)[1] for variant in ("original", "high")}
        for causal in (False, True)
    }
    of_heads = xp.full((H, 1, 1), LAM)
    learned = {causal: refined_softmax(scores, of_heads, "high", causal=causal)[1] for causal in (False, True)}
    more = (B // 4, H, 2 * L, 2 * L)  # too many tokens for registers: attention_long.cu
    long_scores, long_dB = scores.reshape(more), dB.reshape(more)
    long_caches = {causal: refined_softmax(long_scores, LAM, "high", causal=causal)[1] for causal in (False, True)}
    table, S = xp.empty((VOCABULARY, D), np.float32), scores.nbytes
    calls = {
        "softmax": (2 * S, lambda: refined_softmax(scores, LAM, "original")),
        "softmax, gradient": (3 * S, lambda: refined_softmax_backward(dB, caches[False]["original"])),
        "softmax + refinement": (2 * S, lambda: refined_softmax(scores, LAM, "high")),
        "its gradient": (3 * S, lambda: refined_softmax_backward(dB, caches[False]["high"])),
        "causal softmax + refinement": (2 * S, lambda: refined_softmax(scores, LAM, "high", causal=True)),
        "its gradient, causal": (4 * S, lambda: refined_softmax_backward(dB, caches[True]["high"])),
        "gradient, lambda learned": (3 * S, lambda: refined_softmax_backward(dB, learned[False])),
        "the same, causal": (4 * S, lambda: refined_softmax_backward(dB, learned[True])),
        "softmax + refinement of 1024": (2 * S, lambda: refined_softmax(long_scores, LAM, "high")),
        "gradient of 1024": (3 * S, lambda: refined_softmax_backward(long_dB, long_caches[False])),
        "1024, causal": (2 * S, lambda: refined_softmax(long_scores, LAM, "high", causal=True)),
        "gradient of 1024, causal": (4 * S, lambda: refined_softmax_backward(long_dB, long_caches[True])),
        "LayerNorm": (3 * x.nbytes, lambda: ops.layer_norm(x, gamma, beta, 1e-12)),
        "LayerNorm, gradient": (3 * x.nbytes, lambda: ops.layer_norm_backward(x, norm)),
        "bias + GELU": (3 * wide.nbytes, lambda: cuda.bias_gelu(wide, bias, False)),
        "GELU, gradient": (3 * wide.nbytes, lambda: ops.gelu_backward(wide, gelu)),
        "cross-entropy": (2 * logits.nbytes, lambda: ops.cross_entropy(logits, labels)),
        "embedding, gradient": (
            x.nbytes + 2 * table.nbytes,
            lambda: ops.embedding_backward(x, (ids, table.shape)),
        ),
        "AdamW": (7 * weights.nbytes, lambda: optimiser.update(weights, gradient, 1e-4)),
        "sum of rows": (wide.nbytes, lambda: cuda.sum_of_rows(wide)),
    }
    copied = xp.empty_like(scores)
    functions = {"copy": lambda: xp.copyto(copied, scores)} | {name: call for name, (_, call) in calls.items()}
    times = take_turns({name: _repeated(function) for name, function in functions.items()}, 10, xp)
    rows = {name: summary([t / CALLS for t in values]) for name, values in times.items()}
    rate = 2 * S / rows["copy"]["median"]  # bytes per millisecond
    print("\nKernels at the sizes of BERT-Medium, 32 x 512: milliseconds; the floor is its bytes at the rate of a copy")
    for name, (size, _) in calls.items():
        row = rows[name]
        row["bytes"], row["floor"] = size, size / rate
        row["share"] = row["floor"] / row["median"]
        print(
            f"{name:>28}  {row['median']:7.4f}  floor {row['floor']:7.4f} ({size / 1e6:6.0f} MB)  {row['share']:4.0%}"
        )
    return rows


def _repeated(function):
    def call():
        for _ in range(CALLS):
            function()

    return call


def _naive(A, lam):
    """The formula as one would write it."""
    import torch

    S = A.sum(-1, keepdim=True)
    M = torch.exp(lam) * S + (1 - torch.exp(lam)) * A
    B = A * M.prod(-2, keepdim=True) / M
    return B / B.sum(-1, keepdim=True)


def _batch(batch, length):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, VOCABULARY, (batch, length))
    return ids, np.where(rng.random(ids.shape) < 0.15, ids, -100)


def _our_steps(name, ids, labels, xp):
    rows, pool = {}, xp.get_default_memory_pool()
    for variant in ("original", "high"):
        pool.free_all_blocks()
        step = _our_step(name, variant, ids, labels, xp)
        take_turns({"alone": step}, 1, xp)
        rows[f"minisaobp, {variant}"] = {"megabytes": pool.total_bytes() / 1e6}
        del step
    steps = {f"minisaobp, {v}": _our_step(name, v, ids, labels, xp) for v in ("original", "high")}
    for label, times in take_turns(steps, 2 * STEP_REPEATS, xp).items():
        rows[label] |= summary(times)
    del steps
    pool.free_all_blocks()
    return rows


def _their_steps(name, ids, labels, xp, torch, transformers):
    rows = {}
    for variant in ("original", "high"):
        for kind in PEERS:
            torch.compiler.reset()  # what was compiled holds on to its model
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step = _their_step(name, variant, kind, ids, labels, torch, transformers)
            label = f"PyTorch {kind}, {variant}"
            rows[label] = summary(take_turns({"PyTorch": step}, STEP_REPEATS, xp, torch)["PyTorch"])
            rows[label]["megabytes"] = torch.cuda.max_memory_reserved() / 1e6
            del step
    return rows


def _print_steps(name, batch, length, rows):
    print(
        f"\n{name}, batch {batch} x {length}, vocabulary {VOCABULARY}: one training step, milliseconds; memory reserved"
    )
    for label, row in rows.items():
        low, high = row["quartiles"]
        variant = label.partition(", ")[2]
        ratios = _ratios(label, row, {kind: rows.get(f"PyTorch {kind}, {variant}") for kind in PEERS})
        print(f"{label:>28}  {row['median']:7.2f}  ({low:.2f} to {high:.2f})  {row['megabytes']:7.0f} MB{ratios}")
    ratio = rows["minisaobp, high"]["median"] / rows["minisaobp, original"]["median"]
    if "PyTorch labelled, high" in rows:
        print("labelled: compiled, and scores the tokens with a label alone, as minisaobp does; the others score all")
    print(f"high: {ratio:.3f} times original (taking turns)")


def _ratios(label, row, peers):
    """What is printed after a time of ours: how much of PyTorch's it is, which is also noted in its row."""
    if label.startswith("PyTorch") or label == "copy":
        return ""
    found = {kind: row["median"] / peer["median"] for kind, peer in peers.items() if peer}
    row |= {f"of_pytorch_{kind}": ratio for kind, ratio in found.items()}
    return "".join(f"  {ratio:.2f} of PyTorch {kind}" for kind, ratio in found.items())


def _our_step(name, variant, ids, labels, xp):
    config = preset(
        name, VOCABULARY, attention_variant=variant, lam=LAM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return step_of(config, ids, labels, xp=xp)


def _their_step(name, variant, kind, ids, labels, torch, transformers):
    ours = preset(name, VOCABULARY)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = transformers.BertConfig(
        **{key: getattr(ours, key) for key in names},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    module = transformers.models.bert.modeling_bert
    eager = module.eager_attention_forward
    lam = torch.tensor(LAM, device="cuda")

    def refined(module, query, key, value, attention_mask, scaling=None, **_):
        A = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
        A = _naive(A, lam) if variant == "high" else A
        return (A @ value).transpose(1, 2).contiguous(), A

    model = transformers.BertForMaskedLM(config).cuda().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
    ids, labels = (torch.from_numpy(a).cuda() for a in (ids, labels))
    chosen = (labels.flatten() != -100).nonzero()[:, 0]

    def loss_of_all():
        return model(input_ids=ids, labels=labels).loss

    def loss_of_labelled():
        hidden = model.bert(ids).last_hidden_state.flatten(0, 1)
        return torch.nn.functional.cross_entropy(model.cls(hidden[chosen]), labels.flatten()[chosen])

    loss = loss_of_labelled if kind == "labelled" else loss_of_all
    loss = loss if kind == "eager" else torch.compile(loss)

    def step():
        module.eager_attention_forward = refined
        optimiser.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        module.eager_attention_forward = eager

    return step
