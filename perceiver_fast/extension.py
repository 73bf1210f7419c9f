"""Loading of the compiled extension ``perceiver_fast._C``, and what stands in the way when it does not load."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

log = logging.getLogger("perceiver_fast")

_build_record = Path(__file__).with_name("_build.json")


def _why_missing() -> str:
    try:
        record = json.loads(_build_record.read_text())
    except FileNotFoundError:
        return "the C++ extension was not built (run `pip install .`)"
    return f"the C++ extension was not built: {record['skipped']}" if record.get("skipped") else (
        "the C++ extension was built but its file is missing (run `pip install .` again)"
    )


def _load():
    if importlib.util.find_spec("perceiver_fast._C") is None:
        return None, _why_missing()
    try:
        from perceiver_fast import _C

        _C.active_isa()
    except Exception as error:  # a wrong ABI, a missing symbol or a bad PERCEIVER_FAST_CPU_ISA: said once, kept as reason
        log.warning("the C++ extension failed to load, plain PyTorch runs instead: %s", error)
        return None, f"the C++ extension failed to load: {error}"
    return _C, None


module, error = _load()
"""The extension module or None, and why it is None (a str) or None."""


def build_record() -> dict:
    """What the build wrote down: compiler, flags, or why it was skipped. Empty when there was no build."""
    return json.loads(_build_record.read_text()) if _build_record.exists() else {}
