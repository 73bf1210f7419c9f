"""What is installed, what was built and what runs: works also when the extension does not.

The exit code is 1 when something that was built does not load.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from perceiver_fast.gpu import triton_error
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun, plain_table, progress, wide_console
from perceiver_fast.insight.environment import collect
from perceiver_fast.ops.work import binary, decimal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--roofs", action="store_true", help="also measure what this CPU can do at most; takes half a second")
    add(
        "--kernels",
        action="store_true",
        help="compile the Triton kernels ahead of time and list what each needs; needs no GPU, takes minutes",
    )
    add("--arch", type=int, nargs="+", metavar="SM", help="with --kernels: as sm_XY writes them; default: 80 90 100")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code: 1 when something that was built does not load, or a kernel has a fault.

    Raises:
        CannotRun: the kernels are asked for and Triton is not there, or an architecture is not known.
    """
    if args.arch and not args.kernels:
        raise CannotRun("--arch says for what to compile kernels: add --kernels")
    if args.kernels:
        return _kernels(args.arch, args.json)
    found = collect()
    if args.roofs:
        measured = roofs.measure_roofs()
        found["roofs"] = None if measured is None else asdict(measured)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(wide_console(), found)
    return 1 if found["problems"] else 0


def _kernels(architectures: list[int] | None, as_json: bool) -> int:
    """Compile every Triton kernel ahead of time without a GPU and list what it needs; returns the exit code."""
    if triton_error is not None:
        raise CannotRun(triton_error)
    from perceiver_fast.insight import gpu_kernels  # which needs Triton
    from perceiver_fast.kernels import aot

    architectures = architectures or list(aot.ARCHITECTURES)
    if unknown := [arch for arch in architectures if arch not in aot.SHARED]:
        raise CannotRun(f"expected --arch to be among {', '.join(map(str, aot.SHARED))}, got {unknown[0]}")
    headers = ("tile", "warps", "registers", "shared bytes", "instructions a weight", "faults")
    caption = "of the loop over tokens; a loop over channels within it counts once"
    found = []
    for arch in architectures:
        total = sum(1 for _ in gpu_kernels.instances(arch))
        table = plain_table("kernel", numbers=headers, title=f"sm_{arch}: {total} Triton kernels", caption=caption)
        with progress() as say:
            for at, report in enumerate(gpu_kernels.compile_all(arch)):
                say(f"compiling for sm_{arch}", f"{at + 1} of {total}")
                row: dict[str, Any] = report.as_dict()
                found.append(row | {"architecture": arch})
                name, *numbers, faults = row.values()
                cells = ("" if number is None else str(number) for number in numbers)
                table.add_row(escape(name), *cells, "; ".join(faults) or "none")
        if not as_json:
            wide_console().print(table)
    if as_json:
        print(json.dumps(found, indent=2))
    return 1 if any(row["faults"] for row in found) else 0


def _show(console: Console, info: dict) -> None:
    """Print what was collected as a few small tables."""
    if info["problems"]:
        console.rule("[bold red]WHAT WAS BUILT DOES NOT LOAD", style="red")
        for problem in info["problems"]:
            console.print(f"{problem.rstrip('.')}. Plain PyTorch runs instead.", style="bold red", markup=False)
    packages = {name: version or "not installed" for name, version in info["packages"].items()}
    versions = {"perceiver-fast": info["perceiver_fast"], "python": info["python"], "torch": info["torch"]}
    _pairs(console, "Versions", versions | packages)
    machine = {"cpu": info["cpu"], "threads": info["threads"], "gpus": info["gpus"] or "none"}
    _pairs(console, "Machine", machine | {"forced backend": info["forced_backend"]})
    for part, title in (("extension", "C++ kernels"), ("cuda_kernels", "CUDA kernels")):
        _pairs(console, title, {name.replace("_", " "): value for name, value in info[part].items()})
    _show_ops(console, info["backends"])
    _show_products(console, info["linear"])
    _pairs(console, "Environment variables", info["environment"] or {"none": "of those that matter is set"})
    if "roofs" in info:
        _show_roofs(console, info["roofs"])


def _pairs(console: Console, title: str, pairs: dict) -> None:
    table = plain_table("", "", title=title)
    for name, value in pairs.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        table.add_row(name, escape(shown))
    console.print(table)


def _show_ops(console: Console, ops: dict[str, dict[str, dict[str, list[str]]]]) -> None:
    """A row an op, and below the table a line an op and device with what else could run it, and why not others."""
    lines = []
    table = plain_table("op", "on cpu", "on cuda", title="What runs an ordinary float32 call")
    for op, devices in ops.items():
        firsts = []
        for device, backends in devices.items():
            first, *others = [name for name, why in backends.items() if not why] or ["nothing"]
            firsts.append(first)
            text = f"{op} on {device}: {first}" + (f", else {', '.join(others)}" if others else "")
            reasons = [f"not {name}: {', '.join(why)}" for name, why in backends.items() if why]
            lines.append("; ".join([text, *reasons]))
        table.add_row(op, *firsts)
    console.print(table)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _show_products(console: Console, linear: dict) -> None:
    """A line a comparison of libraries: what is taken, how sure that is, and what was measured."""
    pairs = {name.replace("_", " "): found["text"] for name, found in linear["compared"].items()}
    _pairs(console, "What runs large matrix products on the CPU", {"forced": linear["forced"]} | pairs)


def _show_roofs(console: Console, roofs: dict | None) -> None:
    if roofs is None:
        _pairs(console, "Roofs", {"not measured": "the C++ extension, whose instructions they are of, is not there"})
        return
    rates = {"multiply-adds": decimal(roofs["multiply_adds"]), "exponentials": decimal(roofs["exponentials"])}
    rates["copied bytes"] = binary(roofs["copied_bytes"])
    threads = {"threads": f"{roofs['threads']}, together"}
    _pairs(console, "Roofs, float32", {name: f"{rate} a second" for name, rate in rates.items()} | threads)
