"""crosscheck: whether someone's implementation is SAOBP, and if not, which mistake it makes."""

import json
import sys
from pathlib import Path

from . import options

NAME, HELP = "crosscheck", "tell whether an implementation is SAOBP, and if not, which mistake it makes"
DESCRIPTION = (
    "Judge fn(A, lam), which gives the refined attention, or a measure fn(A), written with any array library; or, by "
    "way of files, a program in any language. Exit code 0 if every case that must pass does, 1 if one does not, 2 if "
    "nothing could be judged."
)


def add(parser):
    add = parser.add_argument
    add("function", nargs="?", metavar="package.module:function", help="looked for from the current folder on")
    add("--arrays", choices=["numpy", "torch", "jax", "cupy"], default="numpy",
        help="what A is, and the result has to be (default: %(default)s)")  # fmt: skip
    add("--what", choices=["refine", "entropy", "gtd", "indirect_entropy", "indirect_attention"], default="refine",
        help="the refinement, or a measure: Eq. 2, 13, 14 or 12 (default: %(default)s)")  # fmt: skip
    add("--variant", type=options.variant, default="high", help="high, low, elemmul or original (default: %(default)s)")
    add("--causal", action="store_true", help="the decoder's form: token j hears only i < j")
    add("--gradients", action="store_true", help="compare the derivatives of torch or jax too")
    add("--one-matrix", action="store_true", help="the function takes one (L, L) matrix, not (B, H, L, L)")
    add("--max-length", type=options.whole(8, 1024), default=1024,
        help="leave longer matrices out, for explicit loops (default: %(default)s)")  # fmt: skip
    add("--limit", type=options.real(0.01, 3600), default=30.0, help="seconds for a case (default: %(default)s)")
    add("--seed", type=options.whole(0, 2**63 - 1), help="of the drawn cases (default: new ones each time)")
    add("--json", action="store_true", help="the verdict as JSON, case by case")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--export", metavar="DIR", help="write the questions for a program in any language")
    files.add_argument("--import", dest="import_", metavar="DIR", help="judge the answers that a program wrote there")
    add("--format", choices=["safetensors", "npy"], help="of --export (default: safetensors)")


def run(args, fail):
    if args.format and not args.export:
        fail("argument --format: of --export only")
    if args.function and (args.export or args.import_):
        fail("argument package.module:function: not beside --export or --import, which have none")
    if args.export:
        return _export(args, fail)
    if not args.function and not args.import_:
        fail("expected package.module:function, --export DIR or --import DIR")
    from ..crosscheck.judge import judge

    if args.import_:
        runner, asked, cases = _imported(args, fail)
    else:
        asked, cases = _asked(args, fail), None
        runner = _process(args, fail)
    try:
        verdict = judge(runner, args.function or f"the answers in {args.import_}", asked, cases, _bar)
    finally:
        runner.close()
    print(json.dumps(verdict.as_json(), indent=1, allow_nan=False) if args.json else verdict)
    return 0 if verdict.passed else 1


def _asked(args, fail):
    from ..crosscheck.judge import checked

    names = ("what", "variant", "causal", "arrays", "gradients", "one_matrix", "max_length", "seed", "limit")
    try:
        return checked(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        fail(f"argument --{error}")


def _process(args, fail):
    from ..crosscheck.sandbox import CannotStart, InProcess

    try:
        return InProcess(args.function, args.arrays, args.one_matrix)
    except CannotStart as error:
        fail(f"argument package.module:function: {error}")


def _imported(args, fail):
    from ..crosscheck.exchange import Answers, NotExported

    try:
        runner = Answers(Path(args.import_))
    except NotExported as error:
        fail(f"argument --import: {error}")
    return runner, runner.asked, runner.cases


def _export(args, fail):
    from ..crosscheck.exchange import MANIFEST, export

    if args.arrays != "numpy" or args.one_matrix or args.json:
        fail("argument --export: not beside --arrays, --one-matrix or --json, which are of a function in Python")
    args.arrays = "torch"  # a program in another language may have derivatives
    asked = _asked(args, fail) | {"arrays": "files"}
    folder = options.writable_folder(args.export, (MANIFEST,), fail)
    if any(folder.iterdir()):  # answers of an earlier export would be taken for answers to this one
        fail(f"argument --export: {args.export!r} is not empty, expected a new or empty folder")
    count = export(folder, asked, args.format or "safetensors")
    answer = "output.safetensors" if (args.format or "safetensors") == "safetensors" else "B.npy"
    if asked["what"] != "refine" and args.format == "npy":
        answer = "value.npy"
    print(f"Wrote {count} cases to {folder}: each has case.json, and its program writes {answer} beside it")
    print(f"Then: python -m minisaobp crosscheck --import {args.export}")


def _bar(cases):
    if not sys.stderr.isatty():
        return cases
    from tqdm import tqdm

    return tqdm(cases, desc="crosscheck", unit="case", leave=False)
