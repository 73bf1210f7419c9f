"""What is known of the libraries before anything is measured: which one is the faster on whose processors."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch

from perceiver_fast.ops.linear_verdict import Prior

VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel"}
# Where oneDNN is at least as fast as MKL, by vendor and whether there is AVX-512; elsewhere torch's own product is the
# favourite. Measured by `python -m benchmarks.choice`: benchmarks/results/amd-epyc-*-choice.json.
ONEDNN = {("AMD", False, "forward"), ("AMD", True, "forward"), ("AMD", True, "grad_input")}
MEASURED_WITH = {"MKL": "2024", "oneDNN": "3"}  # the versions, as far as given, that this was measured with
MARGIN = 0.05  # by which share another than the favourite has to be faster
MARGIN_ELSEWHERE = 0.02  # with other versions, or on processors of which nothing is known


def _cpuinfo() -> str:
    """What Linux says of the processor; empty on other systems."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


@functools.cache
def vendor() -> str:
    """The processor's vendor: "AMD", "Intel", or what the system calls it."""
    found = re.search(r"^vendor_id\s*:\s*(\S+)", _cpuinfo(), re.MULTILINE)
    text = found.group(1) if found else platform.processor() or platform.machine()
    return next((short for name, short in VENDORS.items() if name in text), text)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of MKL and oneDNN that torch was built with, those that it has."""
    patterns = {"MKL": r"Math Kernel Library Version ([\d.]+)", "oneDNN": r"MKL-DNN v([\d.]+)"}
    text = torch.__config__.show()
    return {name: found.group(1) for name, pattern in patterns.items() if (found := re.search(pattern, text))}


def avx512() -> bool:
    """Whether torch's libraries find AVX-512 on this CPU."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def prior_of(kind: str, vendor: str, versions: dict[str, str], avx512: bool = False) -> Prior:
    """The favourite of float32's products.

    Args:
        kind: of product, one of KINDS.
        vendor: of the processor.
        versions: of MKL and oneDNN.
        avx512: whether the processor has AVX-512. Default: False.

    Example:
        >>> from perceiver_fast.ops.linear_prior import prior_of
        >>> prior_of("forward", "AMD", {"MKL": "2024.2", "oneDNN": "3.12.0"})
        Prior(favourite='onednn', margin=0.05, why='what is known of AMD')
        >>> prior_of("forward", "Intel", {"MKL": "2027.1", "oneDNN": "3.12.0"}).margin
        0.02
    """
    favourite = "onednn" if (vendor, avx512, kind) in ONEDNN else "torch"
    known = vendor in VENDORS.values() and all(
        versions.get(name, "").split(".")[0] == version for name, version in MEASURED_WITH.items()
    )
    why = (
        f"what is known of {vendor}"
        if vendor in VENDORS.values()
        else f"torch's own, since nothing is known of {vendor},"
    )
    return Prior(favourite, MARGIN if known else MARGIN_ELSEWHERE, why)


def prior_of_bfloat16(native: bool) -> Prior:
    """Whether bfloat16 operands are multiplied as they are, or in float32.

    Args:
        native: whether the processor has instructions for products of bfloat16.
    """
    if native:
        return Prior("bfloat16", MARGIN, "that this CPU has instructions for bfloat16")
    return Prior("float32", MARGIN, "that this CPU has no instructions for bfloat16")


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, as far as torch or the system tell."""
    names = ("amx_bf16", "avx512_bf16", "bf16")
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in names)
    return not set(names).isdisjoint(_cpuinfo().split())
