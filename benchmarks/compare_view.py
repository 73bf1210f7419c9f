"""How a comparison of two results is read: tables for people, and markdown for a pull request."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

TABLE_WIDTH = 150  # what the widest rows need
COLOURS = {"slower": "red", "faster": "green", "more memory": "red", "less memory": "green", "less exact": "red"}


def milliseconds(seconds: float | None) -> str:
    """Three significant digits, and every digit before the point."""
    return "-" if seconds is None else _digits(seconds * 1e3) + " ms"


def mebibytes(amount: int | None) -> str:
    """The same for memory."""
    return "-" if amount is None else _digits(amount / 2**20) + " MiB"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


HEADERS = ("geometry, pass", "peer", "old", "new", "ratio", "over peers'", "memory", "error", "verdict")


def cells(row: dict) -> list[str]:
    """A row as it is printed, under HEADERS; lines of a cell are separated by line feeds."""
    what = f"{row['geometry']} {row['pass']}"
    what += f", batch {row['batch']}" if row["batch"] != 1 else ""
    what += f", {row['dtype']}" if row["dtype"] != "float32" else ""
    pairs = [(row[f"old_{name}"], row[f"new_{name}"]) for name in ("relative_error", "gradient_error")]
    errors = [
        " → ".join("-" if value is None else f"{value:.1e}" for value in pair) for pair in pairs if pair != (None, None)
    ]
    return [
        what,
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


def show(console: Console, comparison: dict) -> None:
    """Print for people: warnings first."""
    for line in comparison["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(line)}", highlight=False)
    for level in dict.fromkeys(row["level"] for row in comparison["rows"]):
        table = Table(title=escape(f"{level}: {title(comparison)}"))
        for header in HEADERS:
            table.add_column(header, justify="left" if header in (*HEADERS[:2], HEADERS[-1]) else "right")
        for row in comparison["rows"]:
            if row["level"] == level:
                words = [f"[{COLOURS[word]}]{word}[/]" if word in COLOURS else word for word in row["verdict"]]
                table.add_row(*map(escape, cells(row)[:-1]), ", ".join(words))
        console.print(table)
    for line in summary(comparison):
        console.print(line, highlight=False, markup=False)


def markdown(comparison: dict) -> str:
    """The same, to paste into a pull request."""
    lines = [f"### Benchmarks: {title(comparison)}", ""]
    lines += [f"- **warning:** {line}" for line in comparison["warnings"]] + [""] * bool(comparison["warnings"])
    for level in dict.fromkeys(row["level"] for row in comparison["rows"]):
        lines += [f"| {' | '.join((f'{level}: {HEADERS[0]}', *HEADERS[1:]))} |", "| --- " * len(HEADERS) + "|"]
        for row in comparison["rows"]:
            if row["level"] == level:
                escaped = [cell.replace("|", r"\|").replace("\n", "<br>") for cell in cells(row)]
                lines.append(f"| {' | '.join(escaped)} |")
        lines.append("")
    return "\n\n".join(["\n".join(lines).rstrip(), *summary(comparison)]) + "\n"
