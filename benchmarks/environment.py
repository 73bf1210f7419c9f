"""What numbers depend on, as every result holds it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import perceiver_fast
from perceiver_fast import backends, extension
from perceiver_fast.insight.environment import cpu_name, package_version

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_THREADS = min(2, os.cpu_count() or 1)
PACKAGES = ("perceiver-pytorch", "transformers", "perceiver-io", "flash-perceiver")


def conditions(threads: int) -> dict:
    """What the numbers depend on; to be called before the measurements, for ``load_at_start`` to be others' work."""
    return {
        "cpu": cpu_name(),
        "isa": extension.module.active_isa() if extension.module else f"none: {extension.error}",
        "threads": threads,
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: package_version(name) for name in PACKAGES},
        "perceiver-fast": perceiver_fast.__version__,
        "forced_backend": backends.forced_backend(),
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The checkout's commit, with ``-dirty`` when files differ from it; None outside a checkout, or without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(command, check=False, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return described.stdout.strip() or None


def slug(text: str) -> str:
    """``text`` as part of a file name.

    Example:
        >>> slug("Intel(R) Xeon(R) Processor")
        'intel-xeon-processor'
    """
    words = re.sub(r"\((r|tm)\)", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")
