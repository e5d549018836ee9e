"""data check: which corpora and tasks lie in a folder, whether they are whole, and how much they hold."""

NAME, HELP = "data", "say which corpora and tasks lie in a folder, and whether they are whole"
DESCRIPTION = (
    "Read every official file of the paper's corpora and tasks below a folder, laid out as data/README.md says, and "
    "compare its rows with the official number. Files beside them that a task can read are listed too."
)


def add(parser):
    parser.add_argument("what", choices=["check"], help="read and count all that is there")
    parser.add_argument("directory", metavar="DIR", help="folder with one folder for each corpus or task")
    parser.add_argument("--skip-bad", action="store_true", help="count bad lines of a file instead of stopping at one")


def run(args, fail):
    from pathlib import Path

    from tqdm import tqdm

    from ..text.catalogue import corpora_in, tasks_in

    if not Path(args.directory).is_dir():
        fail(f"argument DIR: expected a folder, got {args.directory!r}")
    found = [*corpora_in(args.directory), *tasks_in(args.directory)]
    print("Of tasks examples are counted, of corpora words and line ends")
    print(f"{'':<12} {'split':<16} {'counted':>11} {'official':>11}  state")
    damaged = 0
    for title, split, path, official, count in tqdm(found, unit="file", leave=False, disable=None):
        counted, state = None, "not there"
        if path is not None:
            try:
                counted, skipped = count(args.skip_bad)
                state = _state(counted, official) + "".join(f", {n:,} {kind}" for kind, n in skipped.items())
            except ValueError as error:
                state = f"DAMAGED: {error}"
            damaged += "DAMAGED" in state
        shown = ("-" if number is None else f"{number:,}" for number in (counted, official))
        cells = "".join(f" {text:>11}" for text in shown)
        where = f"  {Path(path).relative_to(args.directory)}" if path is not None and "DAMAGED" not in state else ""
        tqdm.write(f"{title:<12} {split:<16}{cells}  {state}{where}")
    if damaged:
        fail(f"{damaged} damaged files in {args.directory}")


def _state(counted, official):
    if official is None:
        return "readable, not an official file"
    if counted == official:
        return "whole"
    return "NOT WHOLE" if counted < official else "MORE THAN OFFICIAL"
