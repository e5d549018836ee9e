"""compare: one small encoder trained with each attention, from the same weights on the same batches."""

import sys

from . import options

NAME, HELP = "compare", "train one small encoder with each attention and compare"
DESCRIPTION = "Train one BERT-style encoder with each attention, from the same weights on the same batches."


def add(parser):
    add, whole = parser.add_argument, options.whole
    parser._negative_number_matcher = options.NEGATIVE_NUMBER
    add("--corpus", nargs="+", metavar="FILE", help="UTF-8 text files (default: Python's own documentation)")
    add("--variants", nargs="+", type=options.variant, metavar="NAME", default=["original", "high", "low", "elemmul"],
        help="attention variants to train (default: original high low elemmul)")  # fmt: skip
    add("--lam", type=options.lam, default=0.2,
        help="lambda, strength of the Potts factor, Eqs. 7, 16 (default: %(default)s)")  # fmt: skip
    add("--steps", type=whole(1, 10**9), default=300, help="training steps per variant (default: %(default)s)")
    add("--seed", type=options.seed, default=0, help="of weights, batches and masks (default: %(default)s)")
    add("--layers", type=whole(1, 10**4), default=4, help="encoder blocks (default: %(default)s)")
    add("--width", type=whole(1, 10**6), default=128, help="model width (default: %(default)s)")
    add("--heads", type=whole(1, 10**6), default=4, help="heads, a divisor of the width (default: %(default)s)")
    add("--length", type=whole(8, 10**5), default=64, help="tokens per sequence (default: %(default)s)")
    add("--batch", type=whole(1, 10**6), default=16, help="sequences per step (default: %(default)s)")
    options.add_device(parser)
    add("--out", default="runs/compare", metavar="DIR", help="for results.json, attention.png (default: %(default)s)")


def run(args, fail):
    if args.width % args.heads:
        fail(f"argument --heads: expected a divisor of --width {args.width}, got {args.heads}")
    if len(set(args.variants)) < len(args.variants):
        fail(f"argument --variants: expected each name once, got {' '.join(args.variants)}")

    xp = options.device_library(args, fail)
    from ..compare import Interrupted, compare, findings, prepare, table
    from ..figures import attention_figure
    from ..nn import Config

    try:
        task = prepare(args.corpus, args.length)
    except ValueError as error:
        fail(f"argument --corpus: {error}")
    text = task.text
    settings = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    configs = {
        name: Config(
            vocab_size=text.vocabulary,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.width,
            max_position_embeddings=args.length,
            hidden_dropout_prob=0.0,  # a few hundred steps do not overfit
            attention_probs_dropout_prob=0.0,
            attention_variant=name,
            lam=args.lam,
        )
        for name in args.variants
    }
    options.check_memory(next(iter(configs.values())), args.batch, args.length, xp, fail)
    out = options.writable_folder(args.out, ("results.json", "attention.png"), fail)
    print(
        f"{text.source}: {text.training.count} training and {text.held_out.count} held-out sequences of "
        f"{args.length} tokens, vocabulary {text.vocabulary}"
    )
    try:
        results, maps = compare(task, configs, settings, out, xp)
    except Interrupted as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        raise
    attention_figure(results, maps, out / "attention.png")
    print("\n" + table(results) + "\n")
    print("\n".join(findings(results)))
    print(f"Wrote {out / 'results.json'} and {out / 'attention.png'}")
