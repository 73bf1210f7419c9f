"""What ``explain`` prints for people: a table within 80 columns, one with all columns, reasons, the geometries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perceiver_fast.insight.console import NARROW, plain_table, wide_console
from perceiver_fast.insight.explanation import Explanation, Layers, amount, on_latents, rejections
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.ops.work import binary, decimal

PEER = "perceiver-pytorch"
NAME_WIDTH = 25  # of a layer's name, so that the narrow table fits


def show(title: str, note: str, found: Explanation, roofs: Roofs | None, why_not: str | None) -> None:
    """Print layer, what it runs on, time, share and saving, within 80 columns."""
    console = wide_console(NARROW)
    _head(console, title, note, found)
    times = [] if roofs is None else ["time"]
    table = _table(["layer", "", "runs on"], [*times, "share", "saving"], _short(found, "", roofs), ["in all", "", ""])
    whole = amount(found, roofs) or 1.0
    for line in found.folded():
        plan = line.rows[0].plan
        way = f"{plan.path}: " if plan.path and plan.path not in plan.taken.op else ""
        cells = _short(line, f"{amount(line, roofs) / whole:.1%}", roofs)
        name = "\n".join(at_dots(line.name, NAME_WIDTH))
        table.add_row(escape(name), line.times, f"{way}{plan.taken.op} on {plan.taken.backend}", *cells)
    console.print("", table, "", sep="\n")
    lines = [
        f"Saving: {PEER}'s multiply-adds in this layer over those here.",
        *_about_times(roofs, why_not),
        "More: --wide shows the counted work, --why what was passed over and why.",
    ]
    console.print("\n".join(lines), style="dim", markup=False, highlight=False)


def show_wide(title: str, note: str, found: Explanation, roofs: Roofs | None, why_not: str | None) -> None:
    """Print all columns: the counted work, and perceiver-pytorch's."""
    console = wide_console()
    _head(console, title, note, found)
    times = [] if roofs is None else ["time"]
    headers = ["multiply-adds", "exponentials", "bytes", *times, "share", f"{PEER}:\nmultiply-adds", "\nbytes"]
    footers = _all(found, "", roofs)
    if found.multiply_adds:
        footers[-2] += f"\n{found.original.multiply_adds / found.multiply_adds:.2f} x"
    table = _table(["layer", "", "runs on"], headers, footers, ["in all", "", ""])
    whole = amount(found, roofs) or 1.0
    for line in found.folded():
        cells = _all(line, f"{amount(line, roofs) / whole:.1%}", roofs)
        table.add_row(escape(line.name), line.times, line.runs_on, *cells)
    console.print(table)
    lines = [
        "Counted work of one forward. Bytes: every operator reads its inputs once and writes its outputs once.",
        *_about_times(roofs, why_not),
    ]
    console.print("\n".join(lines), style="dim", markup=False, highlight=False)


def show_reasons(found: Explanation) -> None:
    """Print why other ways and backends were passed over; and what runs the latents, and why."""
    console = wide_console(NARROW)
    for line in _reasons(found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def show_geometries(facts: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the geometries: sizes, where they come from, what was cut."""
    if as_json:
        print(json.dumps(facts, indent=2))
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


def _head(console: Console, title: str, note: str, found: Explanation) -> None:
    console.print(f"[bold]{escape(title)}[/]" + (f" ({escape(note)})" if note else ""), highlight=False)
    for line in (*found.tokens.split("; ", 1), f"{found.dtype} on {found.device}"):
        console.print(line, markup=False, highlight=False)


def _table(words: list[str], numbers: list[str], footers: list[str], first: list[str]) -> Table:
    """An empty table of columns of words and of numbers, with what all layers do together at the bottom."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True, show_edge=False)
    for header, footer in zip(words, first):
        table.add_column(header, footer, justify="left" if header else "right", no_wrap=header != "runs on")
    for header, footer in zip(numbers, footers):
        table.add_column(header, footer, justify="right", no_wrap=True)
    return table


def _short(layers: Layers, share: str, roofs: Roofs | None) -> list[str]:
    """Time, share and saving of some layers."""
    ours, theirs = layers.counts.multiply_adds, layers.original.multiply_adds
    saving = times_fewer(theirs / ours) if ours and theirs else "-"
    return [*([] if roofs is None else [duration(layers.seconds(roofs))]), share, saving]


def _all(layers: Layers, share: str, roofs: Roofs | None) -> list[str]:
    """What the wide table says of some layers, from left to right."""
    ours, theirs = layers.counts, layers.original
    times = [] if roofs is None else [duration(layers.seconds(roofs))]
    counts = [decimal(ours.multiply_adds), decimal(ours.exponentials), binary(ours.bytes)]
    return [*counts, *times, share, decimal(theirs.multiply_adds), binary(theirs.bytes)]


def duration(seconds: float) -> str:
    """For people: ``1.23 ms``."""
    unit, size = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if seconds >= s), ("us", 1e-6))
    number = seconds / size
    return f"{number:.3g} {unit}" if number < 999.5 else f"{number:,.0f} {unit}"


def at_dots(name: str, width: int) -> list[str]:
    """A dotted name in lines of at most this width, broken before dots where there are any.

    Example:
        >>> at_dots("layers.{0..5}.self_attns.{0..1}.0", 25)
        ['layers.{0..5}.self_attns', '  .{0..1}.0']
    """
    lines = [""]
    for part in re.split(r"(?<!\.)(?=\.(?!\.))", name):  # the dots of {0..5} are none
        if lines[-1].strip() and len(lines[-1] + part) > width:
            lines.append("  ")
        lines[-1] += part
        while len(lines[-1]) > width:
            lines[-1:] = [lines[-1][:width], "  " + lines[-1][width:]]
    return lines


def times_fewer(ratio: float) -> str:
    """A ratio for people: ``31x``, ``1.0x``.

    Example:
        >>> times_fewer(31.4), times_fewer(1.04)
        ('31x', '1.0x')
    """
    return f"{ratio:,.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


def _about_times(roofs: Roofs | None, why_not: str | None) -> list[str]:
    if roofs is None:
        return ["Share: of the counted cost.", f"No times: {why_not}."]
    threads = f"{roofs.threads} thread" + ("s" if roofs.threads > 1 else "")
    rates = f"{decimal(roofs.multiply_adds)} multiply-adds, {decimal(roofs.exponentials)} exponentials"
    return [
        f"Time: predicted, the least for this work on {threads} of this CPU, at",
        f"{rates} and {binary(roofs.copied_bytes)} a second.",
    ]


def _reasons(found: Explanation) -> Iterable[str]:
    """A title for each layer and op that others were passed over for, and the reasons."""
    ran = [(f"{line.name}: {line.runs_on}", line.notes()) for line in found.folded() if line.notes()]
    for title, notes in ran + [(on_latents(choice), rejections(choice)) for choice in found.latents]:
        yield f"\n{title}"
        yield from (f"  {note}" for note in notes)
