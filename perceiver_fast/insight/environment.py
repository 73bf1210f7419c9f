"""The environment that results depend on: versions, build, instruction set, threads, backends, libraries of products."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch

from perceiver_fast import backends, extension
from perceiver_fast.ops.declaration import OPS, Op
from perceiver_fast.ops.linear_choice import COMPARISONS, forced_library, verdict, why_torch
from perceiver_fast.version import __version__

PACKAGES = ("triton", "rich", "perceiver-pytorch", "transformers", "perceiver-io")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF", "TRITON_CACHE_DIR", "TRITON_INTERPRET",
)  # fmt: skip


def _reasons(op: Op, device: str) -> dict[str, list[str]]:
    """Why each backend of an op cannot run an ordinary call on a device; empty where it can."""
    call = op.call(torch.float32, torch.device(device))
    return {backend.name: backend.reasons(call) for backend in op.backends}


def _linear() -> dict:
    """The CPU's libraries for matrix products: what is forced, and what every comparison came to."""
    found = {name: verdict(name) for name in COMPARISONS}
    return {
        "forced": forced_library(),
        "uncompared": why_torch(),
        "compared": {name: asdict(verdict) | {"text": str(verdict)} for name, verdict in found.items()},
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """The installed version of a package; None where it is absent.

    Example:
        >>> package_version("no-such-package") is None
        True
    """
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, str]:
    """Environment variables that are set, of those that change what runs."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("PERCEIVER_FAST_") or name in VARIABLES
    }


def problems() -> list[str]:
    """What was built and does not load; what was never built, or not for this torch, is none."""
    record, found = extension.build_record(), []
    there = importlib.util.find_spec("perceiver_fast._C") is not None
    if extension.error is not None and (there or (record and not record.get("skipped"))):
        found.append(extension.error)
    cuda = record.get("cuda", {})
    there = Path(extension.__file__).with_name("_cuda.so").exists() or (cuda and not cuda.get("skipped"))
    if extension.cuda_error is not None and there and torch.version.cuda is not None:
        found.append(extension.cuda_error)
    return found


def collect() -> dict:
    """Versions, build, instruction set, threads and backends, as a dict that JSON can hold."""
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
        "problems": problems(),
        "perceiver_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "cores_of_threads": None if module is None else module.team_cores(),
        "extension": built,
        "cuda_kernels": cuda,
        "forced_backend": backends.forced_backend(),
        "environment": environment(),
        "linear": _linear(),
        "backends": {name: {device: _reasons(op, device) for device in ("cpu", "cuda")} for name, op in OPS.items()},
    }


def resident_bytes(field: str = "VmRSS") -> int:
    """The resident memory of this process, or with ``"VmHWM"`` its peak.

    Raises:
        OSError: the system has no /proc/self/status with that field.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def forget_peak() -> None:
    """Make the peak of the resident memory what is resident now.

    Raises:
        OSError: the system does not allow it.
    """
    Path("/proc/self/clear_refs").write_text("5")
