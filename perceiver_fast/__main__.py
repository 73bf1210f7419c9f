"""The command line: ``python -m perceiver_fast COMMAND``, also installed as ``perceiver-fast``."""

from __future__ import annotations

import argparse
import os
import sys

import perceiver_fast
from perceiver_fast.commands import accelerate, bench, demo, explain, info, profile
from perceiver_fast.insight.console import CannotRun

# In the order in which a newcomer needs them.
COMMANDS = {
    "info": (info, "versions, build, instruction set and backends, with reasons"),
    "demo": (demo, "a photograph through perceiver-pytorch and perceiver-fast, side by side"),
    "accelerate": (
        accelerate,
        "a model of transformers or another library, made faster: what is done, and how much faster",
    ),
    "explain": (explain, "which way every layer of a model takes, its counted work and predicted time"),
    "bench": (bench, "time, memory and errors beside the peers; two commits; scaling curves"),
    "profile": (profile, "where a model's time goes: torch's profiler, nsys or ncu"),
}
EPILOG = """\
examples:
  perceiver-fast info                            what is installed, and what runs what
  perceiver-fast explain --geometry readme       the model of perceiver-pytorch's README, layer by layer
  perceiver-fast explain --list                  the models that have a name
  perceiver-fast COMMAND --help                  all options of a command

exit codes:
  0  all is well
  1  it ran, and what it found is not
  2  it could not run; standard error says why
"""
INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports of a program that SIGINT or SIGPIPE ended


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(
        prog="perceiver-fast",
        description="Perceiver models many times faster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"perceiver-fast {perceiver_fast.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary))
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code. Without a command it prints the help."""
    top = parser()
    args = top.parse_args(argv)
    try:
        code = 0
        if args.command:
            code = COMMANDS[args.command][0].run(args)
        else:
            top.print_help()
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
