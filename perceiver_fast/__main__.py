"""The command line: ``python -m perceiver_fast COMMAND``, also installed as ``perceiver-fast``.

Arguments are read before torch is imported (:mod:`perceiver_fast.installation`), and a command's module with its run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from perceiver_fast import installation
from perceiver_fast.commands.options import COMMANDS, add_options
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.version import __version__

EPILOG = """\
examples:
  perceiver-fast info                        what is installed, and what runs
  perceiver-fast explain mymodels:build      your model, layer by layer: a function
                                             returns it, and an example input
  perceiver-fast explain --geometry readme   a published model
  perceiver-fast explain --list              the names of the published ones
  perceiver-fast COMMAND --help              all options of a command

exit codes:
  0  it ran, and all is well
  1  it ran, and found a problem
  2  it could not run; standard error says why
"""
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports of a program that SIGINT or SIGPIPE ended


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="perceiver-fast",
        description="Drop-in faster Perceiver models: what is installed, what runs, and how fast it is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"perceiver-fast {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        add_options(name, commands.add_parser(name, help=summary))
    return top


def run(args: argparse.Namespace) -> int:
    """Run the command that was asked for; returns its exit code."""
    if args.command != "bench":  # which may be asked for its help alone
        installation.load()
    return importlib.import_module(f"{__package__}.commands.{args.command}").run(args)


def helped(top: argparse.ArgumentParser) -> int:
    """Print the help, which is what a command line without a command asks for."""
    top.print_help()
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Without a command it prints the help."""
    top = parser()
    args = top.parse_args(argv)
    try:
        code = run(args) if args.command else helped(top)
        sys.stdout.flush()  # what a closed pipe does not take shows here, not when Python exits
        return code
    except CannotRun as reason:
        print(f"{args.command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
