"""The command line: ``python -m perceiver_fast COMMAND``, also installed as ``perceiver-fast``."""

from __future__ import annotations

import argparse
import sys

from perceiver_fast.commands import bench, demo, explain, info, profile

# In the order in which a newcomer needs them.
COMMANDS = {
    "info": (info, "versions, build, instruction set and backends, with reasons"),
    "demo": (demo, "a photograph through perceiver-pytorch and perceiver-fast, side by side"),
    "explain": (explain, "which way every layer of a model takes, its counted work and predicted time"),
    "bench": (bench, "time, memory and errors beside the peers; two commits; scaling curves"),
    "profile": (profile, "where a model's time goes: torch's profiler, nsys or ncu"),
}


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="perceiver-fast", description="Perceiver models many times faster.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary))
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    return COMMANDS[args.command][0].run(args)


if __name__ == "__main__":
    sys.exit(main())
