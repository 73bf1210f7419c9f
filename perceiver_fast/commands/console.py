"""Where commands print what is for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 160  # of a file or a pipe, which have none of their own


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with 1, which says something else here


def wide_console() -> Console:
    """Standard output, wide enough for tables where it is no terminal."""
    console = _Console()
    return console if console.is_terminal else _Console(width=WIDTH)


def plain_table(*columns: str, title: str | None = None) -> Table:
    """A table that ends where its content does; the first column is not wrapped."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0),
        show_header=any(columns),
    )  # fmt: skip
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0)
    return table
