"""What the numbers depend on: device, driver, versions, clocks."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Sequence

PACKAGES = ("torch", "triton", "perceiver-pytorch", "einops", "flash-attn", "numpy")
CLOCKS = (
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip


def conditions(device) -> dict:
    """Of the process that measures, on its ``device``."""
    import torch

    from perceiver_fast.insight.environment import collect, cpu_name, package_version

    found = {"device": cpu_name(), "kind": device.type, "python": platform.python_version()}
    if device.type == "cuda":
        cuda = torch.cuda.get_device_properties(device)
        found |= {
            "device": cuda.name,
            "capability": f"{cuda.major}.{cuda.minor}",
            "multiprocessors": cuda.multi_processor_count,
            "memory_bytes": cuda.total_memory,
            "l2_bytes": cuda.L2_cache_size,
            "cudnn": torch.backends.cudnn.version(),
        }
    found |= {"cuda": torch.version.cuda, "packages": {name: package_version(name) or "absent" for name in PACKAGES}}
    return found | {"tf32": torch.backends.cuda.matmul.allow_tf32, "perceiver_fast": collect()}


def clocks() -> dict:
    """Clock rates, power, temperature and driver of the first GPU by nvidia-smi, or why they are not known.

    A driver that does not know one of the fields answers none of them: then each is asked for by itself.
    """
    found = _ask(CLOCKS)
    if "unknown" not in found or not shutil.which("nvidia-smi"):
        return found
    alone = {field: _ask((field,)) for field in CLOCKS}
    if all("unknown" in answer for answer in alone.values()):
        return found
    return {field: answer.get(field) or f"unknown: {answer['unknown']}" for field, answer in alone.items()}


def _ask(fields: Sequence[str]) -> dict:
    """What nvidia-smi says of these fields, or ``unknown``: why it does not."""
    if not shutil.which("nvidia-smi"):
        return {"unknown": "nvidia-smi was not found"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=5)
    except (subprocess.TimeoutExpired, OSError) as error:
        return {"unknown": f"nvidia-smi: {type(error).__name__}"}
    if done.returncode:
        return {"unknown": f"nvidia-smi: {(done.stderr or done.stdout).strip()[:200]}"}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(","))))
