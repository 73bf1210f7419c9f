"""What benchmarks show and keep: numbers as text, tables, JSON files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

BUSY = 0.5  # a load average above this is other work


def digits(value: float) -> str:
    """Three significant digits, and every digit before the point.

    Example:
        >>> digits(0.012345), digits(98765.4)
        ('0.0123', '98,765')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(seconds: float | None) -> str:
    """A time; "-" where it is not known."""
    return "-" if seconds is None else f"{digits(seconds * 1e3)} ms"


def mebibytes(amount: int | None) -> str:
    """Memory; "-" where it is not known."""
    return "-" if amount is None else f"{digits(amount / 2**20)} MiB"


def times_ours(ratio: float) -> str:
    """A peer's time over ours, in red where ours is the longer."""
    return f"{ratio:.2f}x" if ratio >= 1 else f"[red]{ratio:.2f}x[/red]"


def pass_of(row: dict) -> str:
    """A row's pass, with batch and dtype where they are unusual."""
    batch = "" if row["batch"] == 1 else f", batch {row['batch']}"
    return row["pass"] + batch + ("" if row["dtype"] == "float32" else f", {row['dtype']}")


def described(row: dict) -> str:
    """What a row is of: its geometry and its pass."""
    return f"{row['geometry']} {pass_of(row)}"


def table(
    title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,), **options: object
) -> Table:
    """A table whose columns are aligned right, but those numbered in ``left``; ``options`` are rich's."""
    result = Table(title=title, **options)
    for number, header in enumerate(headers):
        result.add_column(
            header, justify="left" if number in left else "right", no_wrap=bool(options.get("show_lines"))
        )
    for row in rows:
        result.add_row(*row)
    return result


def plain(console: Console, *lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def warn(console: Console, lines: Iterable[str]) -> None:
    """Print what a reader has to know before the numbers."""
    for line in lines:
        console.print(f"[yellow]warning:[/yellow] {escape(line)}", highlight=False)


def listed(conditions: dict) -> str:
    """Conditions in one line."""
    return ", ".join(f"{key} {value}" for key, value in conditions.items())


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` at once: a reader, or a run cut short here, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def as_json(result: object) -> str:
    """``result`` as JSON, which has no NaN and no infinity: they become text."""
    return json.dumps(_strict(result), indent=1, allow_nan=False) + "\n"


def _strict(value: object) -> object:
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(path: Path, result: object) -> None:
    """Keep ``result`` in ``path`` as JSON."""
    replace_file(path, as_json(result))


def deliver(result: object, path: Path | None, show: Callable[[], object]) -> None:
    """What ``--json PATH`` asks for: ``-`` prints JSON in place of what ``show`` prints, a path keeps it beside that."""
    if str(path) == "-":
        print(as_json(result), end="")
        return
    show()
    if path:
        save(path, result)
