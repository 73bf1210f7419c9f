"""The tables of ``explain``, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich import box
from rich.markup import escape
from rich.table import Table

from perceiver_fast.insight.console import plain_table, wide_console
from perceiver_fast.insight.explanation import Explanation, Layers, Line, amount, rejections
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.ops.work import binary, decimal

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
    for line in _reasons(found) if why else ():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _columns(found: Explanation, roofs: Roofs | None) -> dict[str, Callable[[Layers], str]]:
    """Headers, and what stands below them for some layers."""
    whole = amount(found, roofs) or 1.0
    times = {} if roofs is None else {"time": lambda layers: duration(layers.seconds(roofs))}
    return {
        "multiply-adds": lambda layers: decimal(layers.counts.multiply_adds),
        "exponentials": lambda layers: decimal(layers.counts.exponentials),
        "bytes": lambda layers: binary(layers.counts.bytes),
        **times,
        "share": lambda layers: "" if layers is found else f"{amount(layers, roofs) / whole:.1%}",
        f"{PEER}:\nmultiply-adds": lambda layers: decimal(layers.original.multiply_adds) + _saved(layers, found),
        "\nbytes": lambda layers: binary(layers.original.bytes),
    }


def _saved(layers: Layers, found: Explanation) -> str:
    """In all, how many times our multiply-adds perceiver-pytorch's are."""
    ours = found.multiply_adds
    return f"\n{found.original.multiply_adds / ours:.2f} x" if layers is found and ours else ""


def _table(found: Explanation, roofs: Roofs | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True)
    table.add_column("layer", "in all", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("runs on")
    columns = _columns(found, roofs)
    for header, cell in columns.items():
        table.add_column(header, cell(found), justify="right")
    for line in found.folded():
        table.add_row(escape(line.name), line.times, _runs_on(line), *(cell(line) for cell in columns.values()))
    return table


def _runs_on(line: Line) -> str:
    plan = line.rows[0].plan
    return (f"{plan.path}: " if plan.path else "") + f"{plan.taken.op} on {plan.taken.backend}"


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


def _reasons(found: Explanation) -> Iterable[str]:
    """Why other ways and backends were passed over, by line; and what runs the latents, and why."""
    for line in found.folded():
        if notes := line.notes():
            yield f"\n{line.name}: {_runs_on(line)}"
            yield from (f"  {note}" for note in notes)
    for choice in found.latents:
        yield f"\n{choice.op} of the latents on {choice.backend}"
        yield from (f"  {note}" for note in rejections(choice))


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
        numbers = sizes, str(geometry.channels), latents, str(geometry.cross_attentions)
        table.add_row(geometry.name, *numbers, escape(geometry.source), escape(geometry.cut))
    wide_console().print(table)
