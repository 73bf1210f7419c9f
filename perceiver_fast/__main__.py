"""The command line: ``python -m perceiver_fast info | demo``."""

from __future__ import annotations

import argparse
import json
import sys


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="perceiver-fast", description="Perceiver models many times faster.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, build, instruction set and backends, with reasons")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.add_argument(
        "--kernels",
        action="store_true",
        help="compile the Triton kernels ahead of time and list what each needs; needs no GPU, takes minutes",
    )
    info.add_argument(
        "--arch",
        type=int,
        nargs="+",
        metavar="SM",
        help="with --kernels: architectures as sm_XY writes them; default: 80 90 100",
    )
    demo = commands.add_parser("demo", help="a photograph through perceiver-pytorch and perceiver-fast, side by side")
    from perceiver_fast import demo as demo_module

    demo_module.add_arguments(demo)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = parser().parse_args(argv)
    if args.command == "info":
        from perceiver_fast import info

        if args.arch and not args.kernels:
            parser().error("--arch says for what to compile kernels: add --kernels")
        if args.kernels:
            return info.show_kernels(args.arch, as_json=args.json)
        collected = info.collect()
        if args.json:
            print(json.dumps(collected, indent=2))
        else:
            info.show(collected)
        return 0
    from perceiver_fast import demo

    return demo.run(args)


if __name__ == "__main__":
    sys.exit(main())
