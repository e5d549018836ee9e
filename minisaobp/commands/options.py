"""What several commands accept: kinds of numbers, folders, sizes, and one clear line for what they do not."""

import argparse
import contextlib
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# argparse takes "-1e-3" for an option otherwise
NEGATIVE_NUMBER = re.compile(r"^-\.?\d")
DEVICES, DEVICE_HELP = ("cpu", "gpu", "auto"), "where to compute: gpu needs CuPy, auto takes a GPU if there is one"
PRECISIONS, PRECISION_HELP = ("float32", "tf32"), "of a GPU's matrix products: tf32 is faster and keeps 10 bits"


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


def real(low, high):
    return number(float, low, f"a number from {low:g} to {high:g}", high)


def lam(text):
    from ..bp.refinement import MAX_LAM

    return real(-MAX_LAM, MAX_LAM)(text)


def variant(text):
    from ..bp.refinement import VARIANTS
    from ..nn.config import MIXINGS

    if text not in VARIANTS + MIXINGS:
        raise argparse.ArgumentTypeError(f"expected one or more of {', '.join(VARIANTS + MIXINGS)}, got {text!r}")
    return text


def seed(text):
    return whole(0, 2**63 - 1)(text)


def from_toml(path, add, fail):
    """Options in a TOML file, {name: value}, checked as they are on the command line; add: of the command."""
    table = read_toml(path, lambda problem: fail(f"argument --config: {problem}"))
    return from_table(table, add, lambda problem: fail(f"argument --config: {path}: {problem}"))


def read_toml(path, fail):
    try:
        with open(path, "rb") as file:
            return tomllib.loads(file.read().removeprefix(b"\xef\xbb\xbf").decode())  # some editors write the mark
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path} cannot be read as TOML ({error})")


def from_table(table, add, fail):
    """Options of a command from a table {name: value}, by the command's own parser: what it refuses is refused here."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            fail(message)

    parser = Parser(add_help=False, allow_abbrev=False)
    add(parser)
    actions = {name[2:].replace("-", "_"): action for name, action in parser._option_string_actions.items()}
    for name in ("resume", "config"):
        actions.pop(name, None)
    arguments = []
    for name, value in table.items():
        if name.replace("-", "_") not in actions:
            fail(f"{name}: no such option; expected some of {', '.join(actions)}")
        flag = actions[name.replace("-", "_")].nargs == 0
        if flag != isinstance(value, bool) or isinstance(value, dict):
            fail(f"{name}: expected {'true or false' if flag else 'a number, a text or a list of them'}, got {value!r}")
        if isinstance(value, list) and actions[name.replace("-", "_")].nargs is None:
            fail(f"{name}: expected one value, got a list: {value!r}")
        if value is not False:
            values = [] if flag else value if isinstance(value, list) else [value]
            arguments += ["--" + name.replace("_", "-"), *map(str, values)]
    return vars(parser.parse_args(arguments))


def to_toml(options):
    """Options as the bytes of a TOML file that `from_toml` reads; None is left out."""
    # JSON writes numbers, lists and texts as TOML reads them
    given = {name: json.dumps(value, ensure_ascii=False) for name, value in options.items() if value is not None}
    return "".join(f"{name} = {text}\n" for name, text in given.items()).encode("utf-8", "surrogateescape")


def add_device(parser):
    add = parser.add_argument
    add("--device", choices=DEVICES, default="cpu", help=DEVICE_HELP + " (default: %(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help=PRECISION_HELP + " (default: %(default)s)")


def device_library(args, fail):
    """numpy or cupy, as --device and --precision ask."""
    from ..backend import NoGpu, library

    if args.precision == "tf32" and args.device == "cpu":
        fail("argument --precision: tf32 is a GPU's; expected --device gpu or auto beside it")
    os.environ["CUPY_TF32"] = str(int(args.precision == "tf32"))  # CuPy reads it at its first matrix product
    try:
        xp = library(args.device)
    except NoGpu as trouble:
        fail(f"argument --device: {trouble}")
    if args.precision == "tf32" and xp.__name__ == "cupy":
        from ..cuda import allow_tf32

        allow_tf32()
    return xp


def check_memory(config, batch, length, xp, fail):
    """Refuse sizes that this machine's free memory cannot hold, before the system ends the program for it.

    A GPU that has too little says so itself, and ends nothing."""
    from ..nn.model import MODELS

    if xp.__name__ != "numpy":
        return

    parameters = MODELS[config.model_type].parameter_count(config)
    # per token and layer about 34 numbers of the model's width and 8 of each head's attention row are kept; a masked
    # language model scores every fifth token or fewer, a causal one all
    per_token = 34 * config.hidden_size + 8 * config.num_attention_heads * length
    scored = config.vocab_size // 5 if config.model_type == "bert" else 3 * config.vocab_size
    numbers = 5 * parameters + batch * length * (config.num_hidden_layers * per_token + scored)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such system call here: nothing to compare with
        return
    if 4 * numbers > free:
        fail(
            f"arguments --layers, --width, --length, --batch: these sizes need about {4 * numbers / 1e9:.1f} GB of "
            f"memory, expected at most the {free / 1e9:.1f} GB that are free"
        )


@contextlib.contextmanager
def enough_memory(asked, fail):
    """In it a training, of the options `asked`, that the memory cannot hold fails with what to lower."""
    from ..backend import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        length = "" if asked["length"] is None else f" of --length {asked['length']}"  # None: the task's own
        fail(
            f"not enough memory for --batch {asked['batch']} sequences{length}: lower --batch (and raise --accumulate, "
            f"for the same steps) or --length; the last checkpoint, if one was written, is intact ({error})"
        )


def writable_folder(path, names, fail, what="argument --out"):
    """The folder `path`, made if it is not there, in which a file could be made just now and files can have `names`.

    what: says where the path is from."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        fail(f"{what}: expected a folder that can be written, got {str(path)!r} ({error.strerror})")
    for name in names:
        if (Path(path) / name).is_dir():
            fail(f"{what}: {name} is a folder in {str(path)!r}, expected a file or nothing")
    return Path(path)


def add_all(parser, defaults):
    """A function (name, help, ...) that adds an option with its default in the help and, if not given, no attribute:
    beside --resume and --config it matters which options were given. defaults: {name: value}, or words about it."""

    def add(name, help, **more):
        value = defaults.get(name[2:].replace("-", "_"))
        if value is not None and value is not False:
            help += f" (default: {' '.join(value) if isinstance(value, list) else value})"
        parser.add_argument(name, default=argparse.SUPPRESS, help=help, **more)

    return add


def add_training(add):
    """What every training takes; add: of `add_all`."""
    add("--batch", "sequences, or examples, that go through the model at a time", type=whole(1, 10**6))
    add("--accumulate", "batches whose gradients make one step", type=whole(1, 10**6))
    add("--rate", "peak learning rate", type=real(0, 10))
    add("--warmup", "steps until the peak", type=whole(0, 10**9))
    add("--weight-decay", "of AdamW", type=real(0, 10))
    add("--device", DEVICE_HELP, choices=DEVICES)
    add("--precision", PRECISION_HELP, choices=PRECISIONS)


def resumed(path, given, defaults, paths, command, fail):
    """The options of the run that `path` belongs to, the checkpoint's file and what it says about the run.

    given: the options beside --resume, which must be the run's, but for where it computes. defaults: all options of the
    command that started it; paths: names of those that are paths, absolute in a run.
    """
    from ..training.checkpoint import find_checkpoint

    try:
        file, description = find_checkpoint(path)
    except ValueError as error:
        fail(f"argument --resume: {error}")
    asked = description["about"].get("options", {}) | {"out": str(file.parent)}
    if asked.keys() != defaults.keys():
        fail(f"argument --resume: {file} is not of a run that `{command}` started: its options are others")
    try:
        recorded = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["options"] | {"out": asked["out"]}
    except (OSError, ValueError, KeyError, TypeError):
        recorded = description["about"]["options"] | {"out": asked["out"]}  # lost, and written again
    if recorded != description["about"]["options"] | {"out": asked["out"]}:
        fail(f"argument --resume: {file} is a checkpoint of another run than {file.parent / 'run.json'}")
    for name, value in given.items():
        if name in ("device", "precision"):  # a run may move
            asked[name] = value
            continue
        wanted = absolute(value) if name in paths else value
        if name == "out" and os.path.realpath(value) == os.path.realpath(file.parent):
            continue
        if wanted != asked[name]:
            option = name.replace("_", "-")
            fail(f"argument --{option}: expected that of the run, {json.dumps(asked[name])}, got {json.dumps(value)}")
    if asked["device"] == "cpu" and "precision" not in given:
        asked["precision"] = "float32"  # TF32 stays behind on the GPU that the run has left
    return asked, file, description["about"]


def absolute(paths):
    """A path, a list of them or None, as absolute ones: a resumed run may start elsewhere."""
    if paths is None:
        return None
    return [os.path.abspath(path) for path in paths] if isinstance(paths, list) else os.path.abspath(paths)


def opened(path, fail):
    """Model and tokenizer of a training run (its best model) or of a model's directory, and that directory."""
    from ..nn import from_pretrained
    from ..text.tokenizer import load_tokenizer

    directory = Path(path)
    if (directory / "best").is_dir():
        directory /= "best"
    try:
        model = from_pretrained(directory)
    except ValueError as error:
        fail(f"argument --checkpoint: {error}")
    try:
        tokenizer = load_tokenizer(directory)
    except ValueError as error:
        fail(f"argument --checkpoint: {error}")
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        fail(
            f"argument --checkpoint: the tokenizer in {directory} has {tokenizer.get_vocab_size()} pieces, the model a "
            f"vocabulary of {model.config.vocab_size}"
        )
    return model, tokenizer, directory


def run_of(directory, fail):
    """Options of the run in whose folder the model lies, and the fingerprint of its text; None if it lies in none."""
    for folder in (directory.parent, directory.parent.parent):  # best/, or models/step-N/
        path = folder / "run.json"
        if path.exists():
            break
    else:
        return None, None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "task" in record["options"]:  # fine-tuned: on examples, not on a text
            return None, None
        asked = {name: record["options"][name] for name in ("corpus", "length")}
        return asked | {"held_out": record["options"].get("held_out")}, record["text"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"argument --checkpoint: {path} cannot be read as the record of a run ({type(error).__name__}: {error})")
