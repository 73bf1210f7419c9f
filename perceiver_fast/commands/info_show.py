"""What ``info`` collected, as a few small tables."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from perceiver_fast.insight.console import plain_table, wide_console
from perceiver_fast.ops.work import binary, decimal


def show(info: dict) -> None:
    """Print what :func:`perceiver_fast.commands.info.collect` returned, for people."""
    console = wide_console()
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


def _runs(backends: dict[str, list[str]]) -> list[str]:
    """The backends that can run a call, the one that does first."""
    return [name for name, why in backends.items() if not why]


def _show_ops(console: Console, ops: dict[str, dict[str, dict[str, list[str]]]]) -> None:
    devices = list(next(iter(ops.values())))
    table = plain_table("op", *(f"on {device}" for device in devices), title="What runs an ordinary float32 call")
    for op, found in ops.items():
        table.add_row(op, *(next(iter(_runs(found[device])), "nothing") for device in devices))
    console.print(table)
    for op, found in ops.items():
        for device, backends in found.items():
            first, *others = _runs(backends) or ["nothing"]
            text = f"{op} on {device}: {first}" + (f", else {', '.join(others)}" if others else "")
            reasons = [f"not {name}: {', '.join(why)}" for name, why in backends.items() if why]
            console.print("; ".join([text, *reasons]), markup=False, highlight=False, soft_wrap=True)


def _show_products(console: Console, linear: dict) -> None:
    libraries = list(dict.fromkeys(name for speeds in linear["gflops"].values() for name in speeds))
    console.print()
    table = plain_table("", *libraries, "runs", title="Large matrix products on the CPU, GFLOP/s measured just now")
    for kind, speeds in linear["gflops"].items():
        cells = (f"{speeds[name]:.0f}" if name in speeds else "" for name in libraries)
        table.add_row(kind.replace("_", " "), *cells, linear["chosen"][kind])
    console.print(table)
    for name, why in linear["unavailable"].items():
        console.print(f"not {name}: {'; '.join(why)}", markup=False, highlight=False)
    how = "in float32, faster here" if linear["bfloat16_in_float32"] else "as they are"
    console.print(f"bfloat16 operands are multiplied {how}\n", highlight=False)


def _show_roofs(console: Console, roofs: dict | None) -> None:
    if roofs is None:
        _pairs(console, "Roofs", {"not measured": "the C++ extension, whose instructions they are of, is not there"})
        return
    rates = {"multiply-adds": decimal(roofs["multiply_adds"]), "exponentials": decimal(roofs["exponentials"])}
    rates["copied bytes"] = binary(roofs["copied_bytes"])
    threads = {"threads": f"{roofs['threads']}, together"}
    _pairs(console, "Roofs, float32", {name: f"{rate} a second" for name, rate in rates.items()} | threads)
