"""bench: speed and memory beside a peer."""

import argparse

from . import options

NAME, HELP = "bench", "measure speed and memory beside a peer"
DESCRIPTION = "Measure speed and memory as medians with spreads, and as ratios to a peer in the same run."


def add(parser):
    parser.add_argument(
        "what",
        choices=["bp", "train", "text", "cost", "gpu"],
        help="bp: refinement, streaming attention, Algorithm 1 in loops; train: a training step of BERT-Mini; text: "
        "tokens and the input pipeline; cost: each attention beside the original; gpu: the first two on a GPU, matrix "
        "products in TF32",
    )
    parser.add_argument(
        "--device", choices=options.DEVICES, help=f"of cost: {options.DEVICE_HELP}; on a GPU with TF32 (default: cpu)"
    )  # fmt: skip
    parser.add_argument(
        "--corpus", nargs="+", metavar="FILE", help="of text: UTF-8 files (default: Python's own documentation)"
    )
    parser.add_argument(
        "--out", default="runs/bench", metavar="DIR", help="folder for the results as JSON (default: %(default)s)"
    )


def run(args, fail):
    if args.device is not None and args.what != "cost":
        fail("argument --device: only of cost; `bench gpu` is the GPU's benchmark")
    if args.corpus is not None and args.what != "text":
        fail("argument --corpus: only of text")
    device = "gpu" if args.what == "gpu" else args.device or "cpu"
    precision = "float32" if device == "cpu" else "tf32"
    xp = options.device_library(argparse.Namespace(device=device, precision=precision), fail)
    name = "cost-gpu.json" if args.what == "cost" and xp.__name__ == "cupy" else f"{args.what}.json"
    out = options.writable_folder(args.out, (name,), fail)
    if args.what == "cost":
        from ..bench_cost import bench_cost

        return bench_cost(out / name, xp)
    if args.what == "gpu":
        from ..bench_gpu import bench_gpu

        return bench_gpu(out / "gpu.json", xp)
    if args.what == "text":
        from ..bench_text import bench_text

        try:
            return bench_text(out / "text.json", args.corpus)
        except ValueError as error:
            fail(f"argument --corpus: {error}")
    from .. import bench

    {"bp": bench.bench_bp, "train": bench.bench_train}[args.what](out / f"{args.what}.json")
