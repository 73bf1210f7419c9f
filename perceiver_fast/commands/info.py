"""What is installed, what was built and what runs: works also when the extension does not."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from perceiver_fast import backends, extension
from perceiver_fast.ops.cross_attention import BACKENDS as CROSS_ATTENTION
from perceiver_fast.ops.cross_attention import CrossAttentionCall
from perceiver_fast.ops.fourier_projection import BACKENDS as FOURIER_PROJECTION
from perceiver_fast.ops.fourier_projection import FourierProjectionCall
from perceiver_fast.ops.geglu import BACKENDS as GEGLU
from perceiver_fast.ops.geglu import PointwiseCall
from perceiver_fast.ops.grid_attention import BACKENDS as GRID_ATTENTION
from perceiver_fast.ops.grid_attention import GridAttentionCall
from perceiver_fast.ops.grid_scale import BACKENDS as GRID_SCALE
from perceiver_fast.ops.layer_norm import BACKENDS as LAYER_NORM
from perceiver_fast.ops.library import triton_error
from perceiver_fast.ops.linear_libraries import KINDS, LIBRARIES, library_of, measure, wide_bfloat16
from perceiver_fast.ops.linear_libraries import reasons as library_reasons

# The ops with their backends and an ordinary call on a device.
OPS = {
    "grid_attention": (GRID_ATTENTION, lambda device: GridAttentionCall(torch.float32, device, (1,))),
    "cross_attention": (CROSS_ATTENTION, lambda device: CrossAttentionCall(torch.float32, device)),
    "grid_scale": (GRID_SCALE, lambda device: SimpleNamespace(device=device, dtype=torch.float32)),
    "geglu": (GEGLU, lambda device: PointwiseCall(torch.float32, device)),
    "layer_norm": (LAYER_NORM, lambda device: PointwiseCall(torch.float32, device)),
    "fourier_projection": (FOURIER_PROJECTION, lambda device: FourierProjectionCall(torch.float32, device)),
}


def _reasons(op: str, device: str) -> dict[str, list[str]]:
    """Why each backend of an op cannot run on a device; empty where it can."""
    backends_of_op, call = OPS[op]
    return {backend.name: backend.reasons(call(torch.device(device))) for backend in backends_of_op}


def _linear() -> dict:
    """The CPU's libraries for matrix products: why one cannot be used, what was measured, and what was chosen."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        "unavailable": {name: why for name in LIBRARIES if (why := library_reasons(name))},
        "gflops": {
            f"{name} {kind}": {library: round(speed, 1) for library, speed in speeds.items()}
            for name, dtype in dtypes.items()
            for kind, speeds in measure(dtype).items()
        },
        "chosen": {f"{name} {kind}": library_of(kind, dtype) for name, dtype in dtypes.items() for kind in KINDS},
        "bfloat16_in_float32": wide_bfloat16(),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def collect() -> dict:
    """Versions, build, instruction set, threads and backends, as a dict that JSON can hold."""
    import perceiver_fast

    module, record = extension.module, extension.build_record()
    cuda = {**record.pop("cuda", {}), "loaded": extension.cuda_error is None}
    if extension.cuda_error is not None:
        cuda["reason"] = extension.cuda_error
    built = {"built": module is not None}
    if module is None:
        built["reason"] = extension.error
    else:
        built |= {**record, **module.build_info()}
        built |= {"active_isa": module.active_isa(), "available_isas": module.available_isas()}
    return {
        "perceiver_fast": perceiver_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "extension": built,
        "cuda_kernels": cuda,
        "forced_backend": backends.forced_backend(),
        "linear": _linear(),
        "backends": {op: {device: _reasons(op, device) for device in ("cpu", "cuda")} for op in OPS},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="compile the Triton kernels ahead of time and list what each needs; needs no GPU, takes minutes",
    )
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        metavar="SM",
        help="with --kernels: architectures as sm_XY writes them; default: 80 90 100",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.arch and not args.kernels:
        print("info: --arch says for what to compile kernels: add --kernels", file=sys.stderr)
        return 2
    if args.kernels:
        return show_kernels(args.arch, as_json=args.json)
    collected = collect()
    if args.json:
        print(json.dumps(collected, indent=2))
    else:
        show(collected)
    return 0


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

    from perceiver_fast.kernels import aot

    architectures = architectures or list(aot.ARCHITECTURES)
    if unknown := [arch for arch in architectures if arch not in aot.SHARED]:
        known = ", ".join(map(str, aot.SHARED))
        print(f"info --kernels: expected --arch to be among {known}, got {unknown[0]}", file=sys.stderr)
        return 2
    faults, found = 0, []
    for arch in architectures:
        total = sum(1 for _ in aot.instances(arch))
        table = Table(title=f"sm_{arch}: {total} Triton kernels", caption=COUNTED)
        table.add_column("kernel", no_wrap=True)
        for name in ("tile", "warps", "registers", "shared bytes", "instructions a weight"):
            table.add_column(name, justify="right")
        table.add_column("faults")
        progress = Console(stderr=True)
        for report in track(aot.compile_all(arch), f"compiling for sm_{arch}", total, console=progress):
            faults += len(report.faults)
            found.append(report.as_dict() | {"architecture": arch})
            row = found[-1]
            cells = [
                escape(row["kernel"]),
                row["tile"],
                row["warps"],
                row["registers"],
                row["shared"],
                row["instructions"],
            ]
            table.add_row(*("" if cell is None else str(cell) for cell in cells), "; ".join(report.faults) or "none")
        if not as_json:
            console = Console()
            (console if console.is_terminal else Console(width=160)).print(table)
    if as_json:
        print(json.dumps(found, indent=2))
    return 1 if faults else 0


def show(info: dict) -> None:
    """Print ``collect()``'s result for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key in ("perceiver_fast", "python", "torch", "cpu", "threads", "forced_backend"):
        table.add_row(key.replace("_", " "), str(info[key]))
    for part in ("extension", "cuda_kernels"):
        for key, value in info[part].items():
            shown = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(f"{part}: {key}".replace("_", " "), shown)
    linear = info["linear"]
    for kind, speeds in linear["gflops"].items():
        shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        table.add_row(f"linear: {kind}", f"{linear['chosen'][kind]} (GFLOP/s measured: {shown})")
    for name, why in linear["unavailable"].items():
        table.add_row(f"linear: not {name}", "; ".join(why))
    table.add_row(
        "linear: bfloat16 operands", "in float32, faster here" if linear["bfloat16_in_float32"] else "as they are"
    )
    for op, devices in info["backends"].items():
        for device, names in devices.items():
            for name, reasons in names.items():
                table.add_row(f"{op} on {device}: {name}", "; ".join(reasons) or "available")
    Console(soft_wrap=True).print(table)
