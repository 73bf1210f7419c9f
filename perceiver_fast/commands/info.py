"""What is installed, what was built and what runs: works also when the extension does not.

The exit code is 1 when something that was built does not load.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from perceiver_fast.commands.info_kernels import show_kernels
from perceiver_fast.commands.info_show import show
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.environment import collect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--roofs", action="store_true", help="also measure what this CPU can do at most; takes half a second")
    add(
        "--kernels",
        action="store_true",
        help="compile the Triton kernels ahead of time and list what each needs; needs no GPU, takes minutes",
    )
    add("--arch", type=int, nargs="+", metavar="SM", help="with --kernels: as sm_XY writes them; default: 80 90 100")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 when something that was built does not load."""
    if args.arch and not args.kernels:
        raise CannotRun("--arch says for what to compile kernels: add --kernels")
    if args.kernels:
        return show_kernels(args.arch, as_json=args.json)
    collected = collect()
    if args.roofs:
        measured = roofs.measure_roofs()
        collected["roofs"] = None if measured is None else asdict(measured)
    if args.json:
        print(json.dumps(collected, indent=2))
    else:
        show(collected)
    return 1 if collected["problems"] else 0
