"""``info --kernels``: every Triton kernel, compiled ahead of time without a GPU, and what it needs."""

from __future__ import annotations

import json
import sys

from perceiver_fast.commands.console import wide_console
from perceiver_fast.gpu import triton_error

COUNTED = "of the loop over tokens; a loop over channels within it counts once"


def show_kernels(architectures: list[int] | None = None, as_json: bool = False) -> int:
    """Compile every Triton kernel ahead of time and list registers, shared memory and instructions, with their faults.

    Args:
        architectures: as sm_XY writes them. Default: 80, 90 and 100.
        as_json: print JSON rather than a table.

    Returns:
        The exit code: 0, 1 when a kernel has a fault, or 2 when Triton is not there or an architecture is not known.
    """
    if triton_error is not None:
        print(f"info --kernels: {triton_error}", file=sys.stderr)
        return 2
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    from perceiver_fast.insight import gpu_kernels
    from perceiver_fast.kernels import aot

    architectures = architectures or list(aot.ARCHITECTURES)
    if unknown := [arch for arch in architectures if arch not in aot.SHARED]:
        known = ", ".join(map(str, aot.SHARED))
        print(f"info --kernels: expected --arch to be among {known}, got {unknown[0]}", file=sys.stderr)
        return 2
    faults, found = 0, []
    for arch in architectures:
        total = sum(1 for _ in gpu_kernels.instances(arch))
        table = Table(title=f"sm_{arch}: {total} Triton kernels", caption=COUNTED)
        table.add_column("kernel", no_wrap=True)
        for name in ("tile", "warps", "registers", "shared bytes", "instructions a weight"):
            table.add_column(name, justify="right")
        table.add_column("faults")
        progress = Console(stderr=True)
        for report in track(gpu_kernels.compile_all(arch), f"compiling for sm_{arch}", total, console=progress):
            faults += len(report.faults)
            row = report.as_dict() | {"architecture": arch}
            found.append(row)
            cells = (row[name] for name in ("tile", "warps", "registers", "shared", "instructions"))
            numbers = ("" if cell is None else str(cell) for cell in cells)
            table.add_row(escape(row["kernel"]), *numbers, "; ".join(report.faults) or "none")
        if not as_json:
            wide_console().print(table)
    if as_json:
        print(json.dumps(found, indent=2))
    return 1 if faults else 0
