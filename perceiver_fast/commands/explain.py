"""Which way every layer of a model takes on an input, its counted work beside perceiver-pytorch's, and predicted time.

Nothing is computed and no weights are held, so it takes a second or two whatever the model. Times are what the counted
work takes at the rates that this CPU was measured to reach at most; a real forward takes longer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun, plain_table, positive, wide_console
from perceiver_fast.insight.explanation import Explanation, Layers, amount, on_latents, rejections
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.shapes import on_shapes
from perceiver_fast.ops.linear_choice import wide_bfloat16
from perceiver_fast.ops.work import binary, decimal

PEER = "perceiver-pytorch"
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
    """Run the command; returns the exit code.

    Raises:
        CannotRun: no geometry is named, or a forced backend cannot run it.
    """
    if args.list:
        _list_geometries(args.json)
        return 0
    if args.geometry is None:
        raise CannotRun("expected --geometry NAME; --list shows the names")
    if extension.error:
        print(f"explain: the C++ kernels do not run, what follows is plain PyTorch: {extension.error}", file=sys.stderr)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        _explain(args, GEOMETRIES[args.geometry])
    except pf.BackendError as error:
        raise CannotRun(str(error)) from None
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
        _show(geometry, found, measured, why_not, why=args.why)


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


def _show(geometry: Geometry, found: Explanation, roofs: Roofs | None, why_not: str | None, why: bool) -> None:
    """Print what was found of a geometry, with ``why`` also why other ways and backends were passed over."""
    console = wide_console()
    source = "; ".join(filter(None, [geometry.source, geometry.cut and f"cut: {geometry.cut}"]))
    console.print(f"[bold]{geometry.name}[/]" + (f" ({escape(source)})" if source else ""), highlight=False)
    console.print(f"{found.tokens}; {found.dtype} on {found.device}", markup=False, highlight=False)
    console.print(_table(found, roofs))
    console.print(_caption(roofs, why_not), style="dim", markup=False, highlight=False)
    for line in _reasons(found) if why else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(layers: Layers, share: str, roofs: Roofs | None) -> list[str]:
    """What the table says of some layers, from left to right."""
    ours, theirs = layers.counts, layers.original
    times = [] if roofs is None else [duration(layers.seconds(roofs))]
    counts = [decimal(ours.multiply_adds), decimal(ours.exponentials), binary(ours.bytes)]
    return [*counts, *times, share, decimal(theirs.multiply_adds), binary(theirs.bytes)]


def _table(found: Explanation, roofs: Roofs | None) -> Table:
    """A row for repeated layers, and at the bottom what all of them do."""
    times = [] if roofs is None else ["time"]
    headers = ["multiply-adds", "exponentials", "bytes", *times, "share", f"{PEER}:\nmultiply-adds", "\nbytes"]
    footers = _cells(found, "", roofs)
    if found.multiply_adds:
        footers[-2] += f"\n{found.original.multiply_adds / found.multiply_adds:.2f} x"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("layer", "in all", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("runs on")
    for header, footer in zip(headers, footers):
        table.add_column(header, footer, justify="right")
    whole = amount(found, roofs) or 1.0
    for line in found.folded():
        cells = _cells(line, f"{amount(line, roofs) / whole:.1%}", roofs)
        table.add_row(escape(line.name), line.times, line.runs_on, *cells)
    return table


def duration(seconds: float) -> str:
    """For people: ``1.23 ms``."""
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:,.3g} {unit}"


def _caption(roofs: Roofs | None, why_not: str | None) -> str:
    work = "Work of one forward that finds nothing kept. Bytes: operators read inputs and write outputs once."
    if roofs is None:
        return f"{work}\nShare: of the counted cost; no times, since {why_not}."
    threads = f"{roofs.threads} thread" + ("s" if roofs.threads > 1 else "")
    rates = f"{decimal(roofs.multiply_adds)} multiply-adds, {decimal(roofs.exponentials)} exponentials"
    times = f"predicted at the roofs of {threads}: {rates} and {binary(roofs.copied_bytes)} a second."
    return f"{work}\nTime: {times}"


def _reasons(found: Explanation) -> Iterable[str]:
    """Why other ways and backends were passed over, by line; and what runs the latents, and why."""
    ran = [(f"{line.name}: {line.runs_on}", line.notes()) for line in found.folded() if line.notes()]
    for title, notes in ran + [(on_latents(choice), rejections(choice)) for choice in found.latents]:
        yield f"\n{title}"
        yield from (f"  {note}" for note in notes)


def _list_geometries(as_json: bool) -> None:
    """Print the geometries: sizes, where they come from, what was cut."""
    if as_json:
        print(json.dumps([_describe(geometry) for geometry in GEOMETRIES.values()], indent=2))
        return
    table = plain_table("name")
    for header in ("tokens", "raw\nchannels", "latents", "cross-\nattentions"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("source", "cut"):
        table.add_column(header)
    for geometry in GEOMETRIES.values():
        sizes = " x ".join(map(str, geometry.sizes)) + (" points" if geometry.family == "points" else "")
        latents = f"{geometry.queries} x {geometry.model['latent_dim']}"
        numbers = sizes, str(geometry.channels), latents, str(geometry.cross_attentions)
        table.add_row(geometry.name, *numbers, escape(geometry.source), escape(geometry.cut))
    wide_console().print(table)
