"""The tables of ``explain``, for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perceiver_fast.commands.console import plain_table, wide_console
from perceiver_fast.insight.explanation import Explanation, LayerPath, notes, rejections
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.ops.work import Work, binary, decimal

PEER = "perceiver-pytorch"


def show(geometry: Geometry, found: Explanation, roofs: Roofs | None, why_not: str | None, why: bool) -> None:
    """Print what was found of a geometry.

    Args:
        geometry: what was explained.
        found: its explanation.
        roofs: for the predicted times, or None.
        why_not: why there are no roofs.
        why: add why other ways and backends were passed over.
    """
    console = wide_console()
    source = "; ".join(filter(None, [geometry.source, geometry.cut and f"cut: {geometry.cut}"]))
    console.print(f"[bold]{geometry.name}[/]" + (f" ({escape(source)})" if source else ""), highlight=False)
    console.print(f"{found.tokens}; {found.dtype} on {found.device}", markup=False, highlight=False)
    console.print(_table(found, roofs))
    for line in _captions(roofs, why_not):
        console.print(line, style="dim", markup=False, highlight=False)
    if why:
        _show_why(console, found)


def _table(found: Explanation, roofs: Roofs | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    whole, original, saved = found.counts, found.original, ""
    if whole.multiply_adds:
        saved = f"{original.multiply_adds / whole.multiply_adds:.2f} x"
    table.add_column("layer", "in all", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("runs on")
    for header, footer in (
        ("multiply-adds", decimal(whole.multiply_adds)),
        ("exponentials", decimal(whole.exponentials)),
        ("bytes", binary(whole.bytes)),
        ("time", "" if roofs is None else duration(found.seconds(roofs))),
        ("share", ""),
        (f"{PEER}:\nmultiply-adds", f"{decimal(original.multiply_adds)}\n{saved}"),
        ("\nbytes", binary(original.bytes)),
    ):
        if header != "time" or roofs is not None:
            table.add_column(header, footer, justify="right")
    share = dict(zip(map(id, found.rows), found.shares(roofs)))
    for name, paths in found.folded():
        first, counts = paths[0], sum((path.counts for path in paths), Work())
        original = sum((path.original for path in paths), Work())
        cells = [decimal(counts.multiply_adds), decimal(counts.exponentials), binary(counts.bytes)]
        if roofs is not None:
            cells.append(duration(sum(path.seconds(roofs) for path in paths)))
        cells.append(f"{sum(share[id(path)] for path in paths):.1%}")
        cells += [decimal(original.multiply_adds), binary(original.bytes)]
        times = f"{len(paths)} x" if len(paths) > 1 else ""
        table.add_row(escape(name), times, _runs_on(first), *cells)
    return table


def _runs_on(path: LayerPath) -> str:
    way = f"{path.path}: " if path.path else ""
    return f"{way}{path.choice.op} on {path.choice.backend}"


def duration(seconds: float) -> str:
    """For people: ``1.23 ms``."""
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    return f"{seconds / size:,.3g} {unit}"


def _captions(roofs: Roofs | None, why_not: str | None) -> Iterable[str]:
    yield "Work of one forward that finds nothing kept. Bytes: operators read inputs and write outputs once."
    if roofs is None:
        yield f"Share: of the counted cost; no times, since {why_not}."
        return
    threads = f"{roofs.threads} thread" + ("s" if roofs.threads > 1 else "")
    rates = f"{decimal(roofs.multiply_adds)} multiply-adds, {decimal(roofs.exponentials)} exponentials"
    yield f"Time: predicted at the roofs of {threads}: {rates} and {binary(roofs.copied_bytes)} a second."


def _show_why(console: Console, found: Explanation) -> None:
    for name, paths in found.folded():
        if lines := notes(paths[0]):
            console.print(f"\n{name}: {_runs_on(paths[0])}", markup=False, highlight=False)
            for line in lines:
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    for choice in found.latents:
        console.print(f"\n{choice.op} of the latents on {choice.backend}", markup=False, highlight=False)
        for line in rejections(choice):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def show_geometries(geometries: Iterable[Geometry]) -> None:
    """Print the geometries: sizes, where they come from, what was cut."""
    table = plain_table("name")
    for header in ("tokens", "raw\nchannels", "latents", "cross-\nattentions"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("source", "cut"):
        table.add_column(header)
    for geometry in geometries:
        sizes = " x ".join(map(str, geometry.sizes)) + (" points" if geometry.family == "points" else "")
        latents = f"{geometry.queries} x {geometry.model['latent_dim']}"
        table.add_row(
            geometry.name,
            sizes,
            str(geometry.channels),
            latents,
            str(geometry.cross_attentions),
            escape(geometry.source),
            escape(geometry.cut),
        )
    wide_console().print(table)
