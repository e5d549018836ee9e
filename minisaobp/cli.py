"""python -m minisaobp: one command each from `commands/`, and one clear line for what goes wrong."""

import argparse
import os
import sys

from .commands import (
    bench,
    compare,
    course,
    crosscheck,
    data,
    diagnose,
    evaluate,
    finetune,
    generate,
    pretrain,
    sweep,
    train,
)

COMMANDS = (compare, train, pretrain, finetune, sweep, evaluate, generate, diagnose, crosscheck, course, data, bench)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, without the usage text."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser():
    parser = Parser(prog="python -m minisaobp", description="Self-attention one-step belief propagation in NumPy.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        own = commands.add_parser(command.NAME, help=command.HELP, description=command.DESCRIPTION)
        command.add(own)
        own.set_defaults(run=command.run)
    return parser


def main(arguments=None):
    parser = build_parser()
    args = parser.parse_args(arguments)
    prefix = f"{parser.prog} {args.command}"
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None if it was closed
        stream.reconfigure(errors="backslashreplace")  # a file's name need not fit the terminal's encoding
    try:
        code = args.run(args, lambda message: parser.exit(2, f"{prefix}: error: {message}\n"))
    except KeyboardInterrupt:
        print(f"{prefix}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # nobody reads on: not an error of this program, and nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a disk that is full, say
        return parser.exit(2, f"{prefix}: error: {error}\n")
    except Exception as error:
        from .backend import is_out_of_memory  # here: --help wants no NumPy

        if not is_out_of_memory(error):
            raise
        sizes = [f"--{name} {getattr(args, name)}" for name in ("batch", "length") if getattr(args, name, None)]
        lower = f": lower {' or '.join(sizes)}" if sizes else ""  # a command fills in the length that it has chosen
        return parser.exit(2, f"{prefix}: error: not enough memory for these sizes{lower} ({error})\n")
    return code or 0
