"""What :func:`perceiver_fast.accelerate` did with a model: data, and a table for people."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from perceiver_fast.adapters.forwards import StandIn, all_stand_ins

if TYPE_CHECKING:
    from rich.table import Table

NOT_YET = "not called yet"


@dataclass(frozen=True)
class Row:
    """One method of one module.

    Attributes:
        name: of the module in the model.
        kind: what it is: "cross-attention".
        way: how its last call was computed; None if it was not called yet, or its own code ran.
        gain: counted cost of its own code over that of the way taken; None where it is not counted.
        why: why its own code runs; None if it does not.
    """

    name: str
    kind: str
    way: str | None = None
    gain: float | None = None
    why: str | None = None


@dataclass(frozen=True)
class Check:
    """What a comparison with the original model on an example found.

    Attributes:
        dtype: that both were computed in.
        output_error: largest difference of outputs, over the largest output.
        gradient_error: the same of gradients by parameters, each over the largest of its parameter; None if they were
            not compared.
        seconds: of one forward of the original, and of the accelerated model, in the model's own dtype.
        note: what was not compared, and why; or None.
    """

    dtype: str
    output_error: float
    gradient_error: float | None
    seconds: tuple[float, float]
    note: str | None = None

    def __str__(self) -> str:
        text = f"checked in {self.dtype}: outputs differ by {self.output_error:.1e}"
        if self.gradient_error is not None:
            text += f", gradients by {self.gradient_error:.1e}"
        before, after = self.seconds
        text += f". One forward: {before:.3g} s before, {after:.3g} s now, {before / after:.2f} x"
        if after > before:
            text += ". Slower on this example, or the machine was busy; pf.restore(model) undoes it"
        return text + (f". {self.note}" if self.note else "")


@dataclass
class Report:
    """What was accelerated, and what was left alone and why. Print it; or read ``rows``.

    Ways and reasons are those of the model's last call, so they are there after an example or a call.

    Attributes:
        model: the model, accelerated.
        left: modules that were left alone.
        check: what the comparison on the example found; None without one.

    Example:
        >>> import perceiver_fast as pf
        >>> from torch import nn
        >>> report = pf.accelerate(nn.Linear(2, 2))
        >>> report.rows, bool(report)
        ([], False)
    """

    model: nn.Module
    left: list[Row] = field(default_factory=list)
    check: Check | None = None

    def __bool__(self) -> bool:
        """Whether anything was accelerated."""
        return next(all_stand_ins(self.model), None) is not None

    @property
    def rows(self) -> list[Row]:
        """A row for every module that was accelerated or looked at. Modules inside one that ran as a whole have none."""
        found, covered = [], None
        for name, stand_in in all_stand_ins(self.model):
            if covered is not None and name.startswith(covered):
                continue
            row = _row(name, stand_in)
            whole = stand_in.covers and stand_in.why is None
            covered = (f"{name}." if name else "") if whole else None
            if row.way is None and row.why is None and not whole:
                continue  # inside of something else, or of no use in this model
            found.append(row)
        return found + self.left

    def table(self) -> Table:
        """The rows, equal ones of numbered modules as one, as a table of rich."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("module", no_wrap=True)
        table.add_column("", justify="right")
        table.add_column("is")
        table.add_column("now, or why its own code runs", overflow="fold")
        table.caption = "Counted gain: of operations and bytes, not of time."
        table.add_column("counted\ngain", justify="right")
        for row, times in _folded(self.rows):
            says = row.way or (f"left: {row.why}" if row.why else NOT_YET)
            count = f"{times} x" if times > 1 else ""
            gain = "" if row.gain is None else f"{row.gain:.1f}"
            table.add_row(escape(row.name or "(the model)"), count, row.kind, escape(says), gain)
        return table

    def __rich__(self) -> Table:
        table = self.table()
        table.caption = self.summary()
        return table

    def summary(self) -> str:
        """The last line: what the check found, or how to get one."""
        if not self:
            if any(row.why is not None and row.why.startswith("put back") for row in self.left):
                return "nothing is accelerated: all of it was put back, since it differed from the original"
            return "nothing was accelerated: no attention of a known family was found"
        return str(self.check) if self.check else "not checked: pass an example to compare with the original"

    def __str__(self) -> str:
        from rich.console import Console

        nowhere: Any = _Nowhere()
        console = Console(width=140, record=True, file=nowhere, color_system=None)
        console.print(self.table())
        console.print(self.summary(), markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in console.export_text().splitlines())


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def _row(name: str, stand_in: StandIn) -> Row:
    gain = None
    if stand_in.work is not None and stand_in.why is None and stand_in.work[1].cost > 0:
        gain = stand_in.work[0].cost / stand_in.work[1].cost
    return Row(name, stand_in.what(), stand_in.way, gain, stand_in.why)


def _folded(rows: list[Row]) -> list[tuple[Row, int]]:
    """Rows that differ in numbers of their names alone, as one of ``*``; in the order of the first."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        stars = re.sub(r"\b\d+\b", "*", row.name)
        gain = None if row.gain is None else round(row.gain, 1)
        groups.setdefault((stars, row.kind, row.way, gain, row.why), []).append(row)
    found = []
    for (stars, *_), same in groups.items():
        first = same[0]
        name = stars if len(same) > 1 else first.name
        found.append((Row(name, first.kind, first.way, first.gain, first.why), len(same)))
    return found
