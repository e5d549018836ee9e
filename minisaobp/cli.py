"""python -m minisaobp: the commands, what they accept, and one clear line for what they do not."""

import argparse
import math
import os
import re
import sys
import tempfile
from pathlib import Path


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, what, high=math.inf):
    """A parser for one finite number from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def whole(low, high):
    return number(int, low, f"a whole number from {low} to {high}", high)


def lam(text):
    from .bp.refinement import MAX_LAM

    return number(float, -MAX_LAM, f"a number from {-MAX_LAM:g} to {MAX_LAM:g}", MAX_LAM)(text)


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
    )
    compare._negative_number_matcher = re.compile(r"^-\.?\d")  # argparse takes "-1e-3" for an option otherwise
    add = compare.add_argument
    add("--corpus", nargs="+", metavar="FILE", help="UTF-8 text files (default: Python's own documentation)")
    add("--variants", nargs="+", type=variant, metavar="NAME", default=["original", "high", "low", "elemmul"],
        help="attention variants to train (default: original high low elemmul)")  # fmt: skip
    add("--lam", type=lam, default=0.2, help="lambda, strength of the Potts factor, Eqs. 7, 16 (default: %(default)s)")
    add("--steps", type=whole(1, 10**9), default=300, help="training steps per variant (default: %(default)s)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of weights, batches and masks (default: %(default)s)")
    add("--layers", type=whole(1, 10**4), default=4, help="encoder blocks (default: %(default)s)")
    add("--width", type=whole(1, 10**6), default=128, help="model width (default: %(default)s)")
    add("--heads", type=whole(1, 10**6), default=4, help="heads, a divisor of the width (default: %(default)s)")
    add("--length", type=whole(8, 10**5), default=64, help="tokens per sequence (default: %(default)s)")
    add("--batch", type=whole(1, 10**6), default=16, help="sequences per step (default: %(default)s)")
    add("--out", default="runs/compare", metavar="DIR", help="for results.json, attention.png (default: %(default)s)")
    compare.set_defaults(run=run_compare)

    bench = commands.add_parser(
        "bench",
        help="measure speed and memory beside a peer",
        description="Measure speed and memory as medians with spreads, and as ratios to a peer in the same run.",
    )
    bench.add_argument("what", choices=["bp"], help="bp: refinement, streaming attention, Algorithm 1 in loops")
    bench.add_argument(
        "--out", default="runs/bench", metavar="DIR", help="folder for the results as JSON (default: %(default)s)"
    )
    bench.set_defaults(run=run_bench)
    return parser


def run_compare(args, fail):
    if args.width % args.heads:
        fail(f"argument --heads: expected a divisor of --width {args.width}, got {args.heads}")
    if len(set(args.variants)) < len(args.variants):
        fail(f"argument --variants: expected each name once, got {' '.join(args.variants)}")

    from .compare import Interrupted, compare, findings, prepare, table
    from .figures import attention_figure
    from .nn import Config

    try:
        task = prepare(args.corpus, args.length)
    except ValueError as error:
        fail(f"argument --corpus: {error}")
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
    check_memory(next(iter(configs.values())), args.batch, args.length, fail)
    out = writable_folder(args.out, ("results.json", "attention.png"), fail)
    print(
        f"{task.source}: {len(task.ids)} training and {len(task.held_ids)} held-out sequences of {args.length} tokens, "
        f"vocabulary {task.vocabulary}"
    )
    try:
        results, maps = compare(task, configs, settings, out)
    except Interrupted as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        raise
    attention_figure(results, maps, out / "attention.png")
    print("\n" + table(results) + "\n")
    print("\n".join(findings(results)))
    print(f"Wrote {out / 'results.json'} and {out / 'attention.png'}")


def check_memory(config, batch, length, fail):
    """Refuse sizes that this machine's free memory cannot hold, before the system ends the program for it."""
    from .nn import Bert

    parameters = Bert.parameter_count(config)
    # per token and layer about 34 numbers of the model's width and 8 of each head's attention row are kept
    per_token = 34 * config.hidden_size + 8 * config.num_attention_heads * length
    numbers = 5 * parameters + batch * length * (config.num_hidden_layers * per_token + config.vocab_size // 5)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such system call here: nothing to compare with
        return
    if 4 * numbers > free:
        fail(
            f"arguments --layers, --width, --length, --batch: these sizes need about {4 * numbers / 1e9:.1f} GB of "
            f"memory, expected at most the {free / 1e9:.1f} GB that are free"
        )


def run_bench(args, fail):
    out = writable_folder(args.out, (f"{args.what}.json",), fail)
    from .bench import bench_bp

    bench_bp(out / f"{args.what}.json")


def writable_folder(path, names, fail):
    """The folder `path`, made if it is not there, in which a file could be made just now and files can have `names`."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        fail(f"argument --out: expected a folder that can be written, got {path!r} ({error.strerror})")
    for name in names:
        if (Path(path) / name).is_dir():
            fail(f"argument --out: {name} is a folder in {path!r}, expected a file or nothing")
    return Path(path)


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    prefix = f"{parser.prog} {args.command}"
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a file's name need not fit the terminal's encoding
    try:
        args.run(args, lambda message: parser.exit(2, f"{prefix}: error: {message}\n"))
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        return parser.exit(2, f"{prefix}: error: not enough memory for these sizes ({error})\n")
    except BrokenPipeError:  # nobody reads on: not an error of this program, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full, say
        return parser.exit(2, f"{prefix}: error: {error}\n")
    return 0
