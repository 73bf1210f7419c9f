"""Which way every layer of a model takes on an input, its counted work beside perceiver-pytorch's, and predicted time.

Nothing is computed and no weights are held, so it takes a second or two whatever the model. Times are what the counted
work takes at the rates that this CPU was measured to reach at most; a real forward takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys

import torch

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.commands import explain_table
from perceiver_fast.insight import roofs
from perceiver_fast.insight.explanation import Explanation
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry
from perceiver_fast.insight.options import positive
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.shapes import on_shapes
from perceiver_fast.ops.linear_libraries import wide_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    add = parser.add_argument
    add("--geometry", choices=list(GEOMETRIES), metavar="NAME", help="the model and its input: one of --list")
    add("--list", action="store_true", help="list the geometries: sizes, where they come from, what was cut")
    add("--batch", type=positive, default=1, metavar="B", help="inputs at once (default: %(default)s)")
    add("--dtype", choices=list(DTYPES), default="float32", help="of weights and input (default: %(default)s)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="the device need not be there (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads of the predicted times (default: PyTorch's choice)")
    add("--why", action="store_true", help="also say why other ways and backends were passed over")
    add("--json", action="store_true", help="print JSON, with every operator of every layer")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.list and args.json:
        print(json.dumps([_describe(geometry) for geometry in GEOMETRIES.values()], indent=2))
        return 0
    if args.list:
        explain_table.show_geometries(GEOMETRIES.values())
        return 0
    if args.geometry is None:
        print("explain: expected --geometry NAME; --list shows the names", file=sys.stderr)
        return 2
    if extension.error:
        print(f"explain: the C++ kernels do not run, what follows is plain PyTorch: {extension.error}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        _explain(args, GEOMETRIES[args.geometry])
    except pf.BackendError as error:
        print(f"explain: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


def _explain(args: argparse.Namespace, geometry: Geometry) -> None:
    size = (args.batch, *geometry.sizes, geometry.channels)
    found = pf.explain(*on_shapes(geometry.build, size, DTYPES[args.dtype], args.device))
    measured, why_not = measured_roofs(found, torch.get_num_threads())
    if args.json:
        about = _describe(geometry) | {"batch": args.batch, "no_roofs": why_not}
        print(json.dumps(about | found.to_dict(measured), indent=2))
    else:
        explain_table.show(geometry, found, measured, why_not, why=args.why)


def measured_roofs(found: Explanation, threads: int) -> tuple[Roofs | None, str | None]:
    """The roofs that the counted work can be held against, or why there are none."""
    if found.device != "cpu":
        return None, f"no roofs are known for {found.device}"
    if extension.error:
        return None, f"the C++ extension measures the roofs, and is not there ({extension.error})"
    if found.dtype in ("float64", "float16"):
        return None, f"the roofs are those of float32, not {found.dtype}"
    if found.dtype == "bfloat16" and not wide_bfloat16():
        return None, "the roofs are those of float32, and this CPU multiplies bfloat16 faster"
    return roofs.measure_roofs(threads), None


def _describe(geometry: Geometry) -> dict:
    """What JSON says of a geometry."""
    names = "family", "sizes", "channels", "model", "source", "cut"
    return {"geometry": geometry.name} | {name: getattr(geometry, name) for name in names}
