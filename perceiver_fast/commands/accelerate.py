"""What pf.accelerate does with a model of another library: a table of its modules, and the speed on an example.

MODULE:CALLABLE is called without arguments. It returns a model, or a model and an example of what the model is called with:
a tensor, a tuple of arguments or a dict of keywords. With an example the accelerated model is compared with the original
one, outputs and gradients, and both are timed. The current folder is searched for modules too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

import perceiver_fast as pf
from perceiver_fast.insight.console import CannotRun, positive, wide_console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    add = parser.add_argument
    add("source", metavar="MODULE:CALLABLE", help="what makes the model, such as mymodels:build")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--json", action="store_true", help="print JSON")


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


def made(source: str) -> tuple[nn.Module, Any]:
    """The model and the example, or None, that ``MODULE:CALLABLE`` returns."""
    module, colon, name = source.partition(":")
    if not (module and colon and name):
        raise CannotRun(f"expected MODULE:CALLABLE, such as mymodels:build, got {source!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CannotRun(f"{source}: {error}") from None
    if not callable(found):
        raise CannotRun(f"{source}: expected something to call, got {type(found).__name__}")
    result = found()
    model, example = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise CannotRun(
            f"{source}: expected it to return a model, or a model and an example, got {type(model).__name__}"
        )
    return model, example
