"""How a comparison of two results is read: tables for people, and markdown for a pull request."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from benchmarks.output import described, mebibytes, milliseconds, plain, table, warn

COLOURS = {"slower": "red", "faster": "green", "more memory": "red", "less memory": "green"}
COLOURS |= {"less exact": "red", "other results": "red"}
HEADERS = ("geometry, pass", "peer", "old", "new", "ratio", "over peers'", "memory", "error", "verdict")


def cells(row: dict) -> list[str]:
    """A row as it is printed, under HEADERS; lines of a cell are separated by line feeds."""
    pairs = [(row[f"old_{name}"], row[f"new_{name}"]) for name in ("relative_error", "gradient_error")]
    errors = [
        " → ".join("-" if value is None else f"{value:.1e}" for value in pair) for pair in pairs if pair != (None, None)
    ]
    return [
        described(row),
        row["peer"],
        milliseconds(row["old_median"]),
        milliseconds(row["new_median"]),
        *("-" if row[name] is None else f"{row[name]:.2f}x" for name in ("ratio", "normalised")),
        f"{mebibytes(row['old_peak_memory_bytes'])} → {mebibytes(row['new_peak_memory_bytes'])}",
        "\n".join(errors) or "-",
        ", ".join(row["verdict"]),
    ]


def summary(comparison: dict) -> list[str]:
    """The lines below the tables: how the machine changed, why rows are missing, what was found."""
    machine, count = comparison["machine"], comparison["regressions"]
    first = "No other peer is in both: nothing tells changes of the machine from those of the package."
    if machine:
        first = (
            f"Peers that are not ours took {machine['factor']:.2f}x their old time in the geometric mean of "
            f"{machine['rows']} ({machine['lowest']:.2f}x to {machine['highest']:.2f}x); over peers': the ratio over that."
        )
    notes = [
        f"{row['peer']} on {row['geometry']} {row['pass']}: {row['note']}" for row in comparison["rows"] if row["note"]
    ]
    limit = f"Changes of time below {comparison['time_threshold']:.0%} are noise"
    limit += (
        ", twice the standard deviation of the peers'."
        if machine and machine["noise"] > comparison["threshold"]
        else "."
    )
    counted = f"{count} regression{'s' * (count != 1)} of ours."
    return [first, limit, *notes, counted]


def title(comparison: dict) -> str:
    """Which commits, where the results say so."""
    return f"{comparison['old'] or 'old'} → {comparison['new'] or 'new'}"


def coloured(words: list[str]) -> str:
    """A verdict, for rich."""
    return ", ".join(f"[{COLOURS[word]}]{word}[/]" if word in COLOURS else word for word in words)


def by_level(comparison: dict) -> dict[str, list[dict]]:
    """The rows of every level."""
    found = {}
    for row in comparison["rows"]:
        found.setdefault(row["level"], []).append(row)
    return found


def show(console: Console, comparison: dict) -> None:
    """Print for people: warnings first."""
    warn(console, comparison["warnings"])
    for level, rows in by_level(comparison).items():
        lines = [[*map(escape, cells(row)[:-1]), coloured(row["verdict"])] for row in rows]
        left = (0, 1, len(HEADERS) - 1)
        console.print(table(escape(f"{level}: {title(comparison)}"), HEADERS, lines, left))
    plain(console, *summary(comparison))


def markdown(comparison: dict) -> str:
    """The same, to paste into a pull request."""
    lines = [f"### Benchmarks: {title(comparison)}", ""]
    lines += [f"- **warning:** {line}" for line in comparison["warnings"]] + [""] * bool(comparison["warnings"])
    for level, rows in by_level(comparison).items():
        lines += [f"| {' | '.join((f'{level}: {HEADERS[0]}', *HEADERS[1:]))} |", "| --- " * len(HEADERS) + "|"]
        for row in rows:
            escaped = [cell.replace("|", r"\|").replace("\n", "<br>") for cell in cells(row)]
            lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n\n".join(["\n".join(lines).rstrip(), *summary(comparison)]) + "\n"
