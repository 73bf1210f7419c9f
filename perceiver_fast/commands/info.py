"""What is installed, what was built and what runs: works also when the extension does not.

The exit code is 1 when something that was built does not load.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from perceiver_fast.gpu import INTERPRETED, triton_error
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun, plain_table, progress, wide_console
from perceiver_fast.insight.environment import collect
from perceiver_fast.ops.work import binary, decimal

GPU_BACKENDS = ("triton", "cuda")


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
    gpu = bool(info["gpus"])
    packages = {name: version or "not installed" for name, version in info["packages"].items()}
    if not gpu and info["packages"]["triton"] is None:
        del packages["triton"]  # nobody without a GPU needs it
    versions = {"perceiver-fast": info["perceiver_fast"], "python": info["python"], "torch": info["torch"]}
    _pairs(console, "Versions", versions | packages)
    machine = {
        "cpu": info["cpu"],
        "threads": _threads(info["threads"], info["cores_of_threads"]),
        "gpus": info["gpus"] or "none",
    }
    _pairs(console, "Machine", machine | {"forced backend": info["forced_backend"]})
    parts = [("extension", "C++ kernels"), *[("cuda_kernels", "CUDA kernels")] * gpu]
    for part, title in parts:
        _pairs(console, title, {name.replace("_", " "): value for name, value in info[part].items()})
    _show_ops(console, info["backends"], ("cpu", "cuda") if gpu else ("cpu",))
    if not gpu:
        console.print("There is no GPU, so what would run on one is left out: --json has it.\n", highlight=False)
    _show_products(console, info["linear"])
    _pairs(console, "Environment variables", info["environment"] or {"none": "is set that changes what runs"})
    if "roofs" in info:
        _show_roofs(console, info["roofs"])


def _threads(threads: int, cores: int | None) -> str:
    if not cores or cores >= threads:
        return str(threads)
    share = f"share {cores} cores" if cores > 1 else "share one core"
    return f"{threads}, which {share}: torch.set_num_threads({cores}) is faster"


def _pairs(console: Console, title: str, pairs: dict) -> None:
    table = plain_table("", "", title=title)
    for name, value in pairs.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        table.add_row(name, escape(shown))
    console.print(table)


def _show_ops(console: Console, ops: dict[str, dict[str, dict[str, list[str]]]], devices: Sequence[str]) -> None:
    """A row an op, and below the table a line for every reason: which backend it keeps from which ops."""
    headers = [f"{head} {device}" for device in devices for head in ("on", "else on")]
    table = plain_table("op", *headers, title="What runs an ordinary float32 call")
    kept_from: dict[tuple[str, str, str], list[str]] = {}
    for op, found in ops.items():
        cells = []
        for device in devices:
            first, *others = [name for name, why in found[device].items() if not why] or ["nothing"]
            cells += [first, ", ".join(others)]
            for name, reasons in found[device].items():
                # Without a GPU nobody asks why a GPU's kernels do not run.
                if reasons and ("cuda" in devices or INTERPRETED or name not in GPU_BACKENDS):
                    kept_from.setdefault((name, device, "; ".join(reasons)), []).append(op)
        table.add_row(op, *cells)
    console.print(table)
    for (name, device, why), kept in kept_from.items():
        which = "every op" if len(kept) == len(ops) else ", ".join(kept)
        text = f"not {name} on {device}: {why} ({which})"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


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
    threads = {"threads": f"{roofs['threads']}, measured together"}
    _pairs(console, "Roofs, float32", {name: f"{rate} a second" for name, rate in rates.items()} | threads)
