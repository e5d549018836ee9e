"""bench: speed and memory beside a peer."""

from . import options

NAME, HELP = "bench", "measure speed and memory beside a peer"
DESCRIPTION = "Measure speed and memory as medians with spreads, and as ratios to a peer in the same run."


def add(parser):
    parser.add_argument(
        "what",
        choices=["bp", "train"],
        help="bp: refinement, streaming attention, Algorithm 1 in loops; train: a training step of BERT-Mini",
    )
    parser.add_argument(
        "--out", default="runs/bench", metavar="DIR", help="folder for the results as JSON (default: %(default)s)"
    )


def run(args, fail):
    out = options.writable_folder(args.out, (f"{args.what}.json",), fail)
    from .. import bench

    {"bp": bench.bench_bp, "train": bench.bench_train}[args.what](out / f"{args.what}.json")
