"""python -m minisaobp: the commands, what they accept, and one clear line for what they do not."""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, what):
    """A parser for one number of at least `low`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def lam(text):
    from .bp.refinement import MAX_LAM

    return number(float, -MAX_LAM, f"a number from {-MAX_LAM:g} to {MAX_LAM:g}")(text)


def variant(text):
    from .bp.refinement import VARIANTS

    if text not in VARIANTS:
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(VARIANTS)}, got {text!r}")
    return text


def build_parser():
    parser = Parser(prog="python -m minisaobp", description="Self-attention one-step belief propagation in NumPy.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    compare = commands.add_parser(
        "compare",
        help="train one small encoder with each attention and compare",
        description="Train one BERT-style encoder with each attention, from the same weights on the same batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = "a whole number of at least {}".format
    add = compare.add_argument
    add("--corpus", nargs="+", metavar="FILE", help="UTF-8 text files (default: Python's own documentation)")
    add("--variants", nargs="+", type=variant, metavar="NAME", help="attention variants to train",
        default=["original", "high", "low", "elemmul"])  # fmt: skip
    add("--lam", type=lam, default=0.2, help="lambda, the strength of the Potts factor (Eqs. 7 and 16)")
    add("--steps", type=number(int, 1, whole(1)), default=300, help="training steps per variant")
    add("--seed", type=number(int, 0, whole(0)), default=0, help="seed of weights, batches and masks")
    add("--layers", type=number(int, 1, whole(1)), default=4, help="encoder blocks")
    add("--width", type=number(int, 1, whole(1)), default=128, help="model width")
    add("--heads", type=number(int, 1, whole(1)), default=4, help="attention heads, a divisor of the width")
    add("--length", type=number(int, 8, whole(8)), default=64, help="tokens per sequence")
    add("--batch", type=number(int, 1, whole(1)), default=16, help="sequences per step")
    add("--out", default="runs/compare", metavar="DIR", help="folder for results.json and attention.png")
    compare.set_defaults(run=run_compare)

    bench = commands.add_parser(
        "bench",
        help="measure speed and memory beside a peer",
        description="Measure speed and memory as medians with spreads, and as ratios to a peer in the same run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    bench.add_argument("what", choices=["bp"], help="bp: refinement, streaming attention, Algorithm 1 in loops")
    bench.add_argument("--out", default="runs/bench", metavar="DIR", help="folder for the results as JSON")
    bench.set_defaults(run=run_bench)
    return parser


def run_compare(args, fail):
    if args.width % args.heads:
        fail(f"argument --heads: expected a divisor of --width {args.width}, got {args.heads}")
    if len(set(args.variants)) < len(args.variants):
        fail(f"argument --variants: expected each name once, got {' '.join(args.variants)}")

    from .compare import compare, findings, prepare, table
    from .figures import attention_figure
    from .nn import Config

    try:
        task = prepare(args.corpus, args.length)
    except ValueError as error:
        fail(f"argument --corpus: {error}")
    out = writable_folder(args.out, fail)
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    configs = {
        name: Config(
            vocab_size=task.vocabulary,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.width,
            max_position_embeddings=args.length,
            attention_variant=name,
            lam=args.lam,
        )
        for name in args.variants
    }
    print(
        f"{task.source}: {len(task.ids)} training and {len(task.held_ids)} held-out sequences of {args.length} tokens, "
        f"vocabulary {task.vocabulary}"
    )
    try:
        results, maps = compare(task, configs, settings, out)
    except KeyboardInterrupt:
        print(f"\nWhat was finished is in {out / 'results.json'}, marked incomplete.", file=sys.stderr)
        raise
    attention_figure(results, maps, out / "attention.png")
    print("\n" + table(results) + "\n")
    print("\n".join(findings(results)))
    print(f"Wrote {out / 'results.json'} and {out / 'attention.png'}")


def run_bench(args, fail):
    out = writable_folder(args.out, fail)
    from .bench import bench_bp

    bench_bp(out / f"{args.what}.json")


def writable_folder(path, fail):
    """The folder `path`, made if it is not there, in which a file could be made just now."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        fail(f"argument --out: expected a folder that can be written, got {path!r} ({error.strerror})")
    return Path(path)


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    prefix = f"{parser.prog} {args.command}"
    try:
        args.run(args, lambda message: parser.exit(2, f"{prefix}: error: {message}\n"))
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        return parser.exit(2, f"{prefix}: error: not enough memory for these sizes ({error})\n")
    return 0
