"""What is installed, what was built and what runs: works also when the extension does not."""

from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import torch

from perceiver_fast import backends, extension
from perceiver_fast.ops.cross_attention import BACKENDS as CROSS_ATTENTION
from perceiver_fast.ops.cross_attention import CrossAttentionCall
from perceiver_fast.ops.fourier_projection import BACKENDS as FOURIER_PROJECTION
from perceiver_fast.ops.fourier_projection import FourierProjectionCall
from perceiver_fast.ops.grid_attention import BACKENDS as GRID_ATTENTION
from perceiver_fast.ops.grid_attention import GridAttentionCall
from perceiver_fast.ops.grid_scale import BACKENDS as GRID_SCALE

# The ops with their backends and an ordinary call on a device.
OPS = {
    "grid_attention": (GRID_ATTENTION, lambda device: GridAttentionCall(torch.float32, device, (1,))),
    "cross_attention": (CROSS_ATTENTION, lambda device: CrossAttentionCall(torch.float32, device)),
    "grid_scale": (GRID_SCALE, lambda device: SimpleNamespace(device=device, dtype=torch.float32)),
    "fourier_projection": (FOURIER_PROJECTION, lambda device: FourierProjectionCall(torch.float32, device)),
}


def _reasons(op: str, device: str) -> dict[str, list[str]]:
    """Why each backend of an op cannot run on a device; empty where it can."""
    backends_of_op, call = OPS[op]
    return {backend.name: backend.reasons(call(torch.device(device))) for backend in backends_of_op}


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
        "backends": {op: {device: _reasons(op, device) for device in ("cpu", "cuda")} for op in OPS},
    }


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
    for op, devices in info["backends"].items():
        for device, names in devices.items():
            for name, reasons in names.items():
                table.add_row(f"{op} on {device}: {name}", "; ".join(reasons) or "available")
    Console(soft_wrap=True).print(table)
