"""Progress of long work on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

Report = Callable[..., object]
"""Called with what is being done, and optionally how far it is."""


@contextmanager
def progress() -> Iterator[Report]:
    """A spinner on a terminal; elsewhere a line for each thing that is done, without how far it is.

    Example:
        >>> with progress() as say:
        ...     say("counting", "1 of 2")
        ...     say("counting", "2 of 2")
    """
    console = Console(stderr=True)
    shown = []

    def line(what: str, detail: str = "") -> None:
        if shown != [what]:
            shown[:] = [what]
            console.print(what, markup=False, highlight=False, soft_wrap=True)

    if not console.is_terminal:
        yield line
        return
    with console.status("starting") as status:
        yield lambda what, detail="": status.update(escape(f"{what}: {detail}" if detail else what))
