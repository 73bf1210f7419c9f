"""Facts about the machine and what is installed on it, which results are kept with."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


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
