"""Scaling curves as pictures: time and memory, log-log, a row of two panels for each axis."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.scaling.record import MEASURED, Point, curve

# Okabe and Ito's colours, which colour-blind eyes tell apart; a marker for those who see none.
LOOKS = {
    "eager": ("perceiver-pytorch", "#0072B2", "s"),
    "sdpa": ("with SDPA", "#009E73", "^"),
    "compile": ("torch.compile, SDPA", "#CC79A7", "D"),
    "fast": ("perceiver-fast", "#D55E00", "o"),
}
GREY = "#777777"
PASSES = {"forward": "forward pass", "step": "forward and backward pass"}
PANELS = {  # the scale, the unit and the title of a value
    "median": (1e3, "milliseconds", "Time of a {}"),
    "peak_memory_bytes": (2**-20, "MiB", "Peak memory that a {} adds"),
}
LINE = 0.055  # of a name's text, as a share of the panel's height
MARGIN = 1.3  # around sizes, as a factor


def draw(conditions: dict, points: list[Point], stem: Path) -> list[Path]:
    """Draw what was measured.

    Args:
        conditions: of the measurements; what is known of cpu, threads, torch and date goes under the picture.
        points: of one pass and dtype.
        stem: the files' path without an ending.

    Returns:
        The paths of the PNG and the SVG.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point.axis for point in points))
    with rc_context({"svg.hashsalt": "perceiver-fast", "font.size": 9}):  # the same points, the same file
        figure = Figure(figsize=(13, 4.6 * len(axes) + 0.4), layout="constrained")
        panels = figure.subplots(len(axes), 2, squeeze=False)
        for axis, row in zip(axes, panels, strict=True):
            here = [point for point in points if point.axis == axis]
            for value, panel in zip(PANELS, row, strict=True):
                _panel(panel, here, axis, value)
        known = [f"{key} {conditions[key]}" for key in ("cpu", "threads", "torch", "date") if conditions.get(key)]
        figure.supxlabel(", ".join([*known, "x: where a peer stopped"]), fontsize=8, color=GREY)
        paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _panel(panel, points: list[Point], axis: str, value: str) -> None:
    """One panel: a curve for each peer, where it stopped, the guide."""
    (scale, unit, title), first = PANELS[value], points[0]
    title = f"{title.format(PASSES[first.pass_name])}, {first.dtype}"
    tokens, latents = f"M, tokens (N = {first.latents:,} latents)", f"N, latents (M = {first.tokens:,} tokens)"
    panel.set(xscale="log", yscale="log", title=title, xlabel=tokens if axis == "tokens" else latents, ylabel=unit)
    panel.grid(which="major", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    names, values = [], []
    for peer in dict.fromkeys(point.peer for point in points):
        name, colour, marker = LOOKS[peer]
        line = [(size, scale * number) for size, number in curve(points, axis, peer, value)]
        if not line:
            continue
        values += [number for _, number in line]
        panel.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=4, linewidth=1 + (peer == "fast"))
        stop = next((point for point in points if point.peer == peer and point.status != MEASURED), None)
        end = line[-1]
        if stop is not None:
            name = f"{name}: {_stop_text(stop)}"
            if value == "peak_memory_bytes" and stop.needed_bytes:
                end = stop.size, scale * stop.needed_bytes
                panel.plot(*zip(line[-1], end, strict=True), color=colour, linewidth=1, linestyle=":")
                values.append(end[1])
            panel.plot(*end, color=colour, marker="x", markersize=9, markeredgewidth=2)
        names.append((*end, name, colour))
    if not names:
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center", color=GREY)
        return
    if value == "peak_memory_bytes":
        inputs = sorted({(point.size, scale * point.input_bytes) for point in points if point.input_bytes})
        values += [number for _, number in inputs]
        panel.plot(*zip(*inputs, strict=True), color=GREY, linewidth=1, linestyle=":")
        names.append((*inputs[-1], "the input itself", GREY))
    sizes = [point.size for point in points]
    panel.set_xlim(min(sizes) / MARGIN, max(sizes) * MARGIN)
    panel.set_ylim(min(values) / 2, max(values) * 2)
    _guide(panel, points, axis, value)
    _label(panel, names)


def _stop_text(stop: Point) -> str:
    symbol = "M" if stop.axis == "tokens" else "N"
    needed = f" (would need {stop.needed_bytes / 2**30:.3g} GiB)" if stop.needed_bytes else ""
    return f"{stop.status}\nat {symbol} = {stop.size:,}{needed}"


def _guide(panel, points: list[Point], axis: str, value: str) -> None:
    """A line of slope one below our curve's end, or the first peer's: what grows as the axis does."""
    peers = [peer for peer in ("fast", *LOOKS) if curve(points, axis, peer, value)]
    line = curve(points, axis, peers[0], value)
    (start, _), (end, last) = line[0], line[-1]
    last *= PANELS[value][0] / 2
    panel.plot([start, end], [last * start / end, last], color="#aaaaaa", linestyle="--", linewidth=1, scaley=False)
    middle = math.sqrt(start * end)
    panel.annotate(
        "slope 1", (middle, last * middle / end), xytext=(4, -9), textcoords="offset points", color=GREY, fontsize=8
    )


def _label(panel, names: list[tuple[float, float, str, str]]) -> None:
    """A name for the end of each curve, on the right, where none covers another."""
    lowest, highest = (math.log10(limit) for limit in panel.get_ylim())
    names = sorted(names, key=lambda entry: entry[1])
    wished = [(math.log10(y) - lowest) / (highest - lowest) for _, y, _, _ in names]
    for (x, y, name, colour), place in zip(names, spread([n[2].count("\n") + 1 for n in names], wished), strict=True):
        panel.annotate(
            name, (x, y), xytext=(1.03, place), textcoords="axes fraction", va="center", color=colour, fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 4, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(lines: list[int], wished: list[float]) -> list[float]:
    """Heights near the wished ones, in their order, at which texts of so many lines fit between 0 and 1.

    Example:
        >>> [round(height, 2) for height in spread([1, 1, 1], [0.2, 0.95, 0.98])]
        [0.2, 0.92, 0.97]
    """
    heights = [LINE * count for count in lines]
    places: list[float] = []
    bottom = 0.0
    for height, wish in zip(heights, wished, strict=True):
        places.append(max(wish, bottom + height / 2))
        bottom = places[-1] + height / 2
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top - heights[i] / 2)
        top = places[i] - heights[i] / 2
    return places
