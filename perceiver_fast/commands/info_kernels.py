"""``info --kernels``: every Triton kernel, compiled ahead of time without a GPU, and what it needs."""

from __future__ import annotations

import json

from rich.markup import escape

from perceiver_fast.gpu import triton_error
from perceiver_fast.insight.console import CannotRun, plain_table, progress, wide_console

COUNTED = "of the loop over tokens; a loop over channels within it counts once"
NUMBERS = ("tile", "warps", "registers", "shared", "instructions")


def show_kernels(architectures: list[int] | None = None, as_json: bool = False) -> int:
    """Compile every Triton kernel ahead of time and list registers, shared memory and instructions, with their faults.

    Args:
        architectures: as sm_XY writes them. Default: 80, 90 and 100.
        as_json: print JSON rather than a table.

    Returns:
        The exit code: 0, or 1 when a kernel has a fault.

    Raises:
        CannotRun: Triton is not there, or an architecture is not known.
    """
    if triton_error is not None:
        raise CannotRun(triton_error)
    from perceiver_fast.insight import gpu_kernels  # which needs Triton
    from perceiver_fast.kernels import aot

    architectures = architectures or list(aot.ARCHITECTURES)
    if unknown := [arch for arch in architectures if arch not in aot.SHARED]:
        raise CannotRun(f"expected --arch to be among {', '.join(map(str, aot.SHARED))}, got {unknown[0]}")
    found = []
    for arch in architectures:
        total = sum(1 for _ in gpu_kernels.instances(arch))
        headers = ("tile", "warps", "registers", "shared bytes", "instructions a weight", "faults")
        table = plain_table("kernel", numbers=headers, title=f"sm_{arch}: {total} Triton kernels", caption=COUNTED)
        with progress() as say:
            for at, report in enumerate(gpu_kernels.compile_all(arch)):
                say(f"compiling for sm_{arch}", f"{at + 1} of {total}")
                row = report.as_dict() | {"architecture": arch}
                found.append(row)
                numbers = ("" if row[name] is None else str(row[name]) for name in NUMBERS)
                table.add_row(escape(row["kernel"]), *numbers, "; ".join(report.faults) or "none")
        if not as_json:
            wide_console().print(table)
    if as_json:
        print(json.dumps(found, indent=2))
    return 1 if any(row["faults"] for row in found) else 0
