"""What commands take from people and show them: options, tables on standard output, progress on standard error.

Functions import rich when they are called: the command line needs it for what it shows, not for its options.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 160  # of a file or a pipe, which have none of their own
NARROW = 80  # the same, for what is made to fit a terminal that nobody has widened

Report = Callable[..., object]
"""Called with what is being done, and optionally how far it is."""


class CannotRun(Exception):
    """What a command needs is not there. Its message says what, and what to do; the exit code is 2."""


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return number


positive = at_least(1)


def wide_console(width: int = WIDTH) -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1, which says something else here

    console = Quiet()
    return console if console.is_terminal else Quiet(width=width)


def plain_table(
    *columns: str, numbers: Sequence[str] = (), title: str | None = None, caption: str | None = None
) -> Table:
    """A table that ends where its content does; the first column is not wrapped.

    Args:
        columns: headers of columns of words.
        numbers: headers of the columns after these, aligned to the right.
        title, caption: what is above and below.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(columns),
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


@contextmanager
def progress() -> Iterator[Report]:
    """A spinner on a terminal; elsewhere a line for each thing that is done, without how far it is.

    Example:
        >>> with progress() as say:
        ...     say("counting", "1 of 2")
        ...     say("counting", "2 of 2")
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    shown = None

    def line(what: str, detail: str = "") -> None:
        nonlocal shown
        if what != shown:
            shown = what
            console.print(what, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    with console.status("starting") as status:
        yield lambda what, detail="": status.update(escape(f"{what}: {detail}" if detail else what))
