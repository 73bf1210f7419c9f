"""What pf.accelerate does with a model of another library: a table of its modules, and the speed on an example."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

import perceiver_fast as pf
from perceiver_fast.commands.own_model import made
from perceiver_fast.insight.console import wide_console


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 when nothing was accelerated, or something was put back.

    Raises:
        CannotRun: there is no such callable, or it returns something else.
    """
    model, example = made(args.source)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        report = pf.accelerate(model, example)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        check = None if report.check is None else asdict(report.check)
        print(json.dumps({"rows": [asdict(row) for row in report.rows], "check": check}, indent=2))
    else:
        console = wide_console()
        console.print(report.table())
        console.print(report.summary(), markup=False, highlight=False)
    return 1 if not report or any((row.why or "").startswith("put back") for row in report.rows) else 0
