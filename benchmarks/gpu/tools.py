"""The commands of a run that measure nothing themselves: trials, compute-sanitizer, ncu and the tuner.

Each returns what becomes of it in the result; a tool that is not there is left out, with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks.gpu.prepare import interpreted, run_logged

SANITIZED = ("grid_attention", "cross_attention", "grid_query_attention")
SWEEPS = "grid_attention_(forward|backward)_kernel"
PROFILED = "op/imagenet-lucid/64/bf16/step"
TUNED = ("grid_attention_forward[bf16]", "grid_attention_backward[bf16]", "grid_attention_forward[fma]",
         "grid_attention_backward[fma]")  # fmt: skip
MODULE = "benchmarks.gpu.trials"


def outcome(code: int | None, seconds: float, took: float, log: str) -> dict:
    """What a command's end means; None is the exit code of one that was stopped."""
    said = "stopped" if code is None else "passed" if code == 0 else "failed"
    return {"outcome": said, "exit_code": code, "seconds": round(took, 1), "allowed": round(seconds, 1), "log": log}


def absent(tool: str) -> dict | None:
    """What the result says where there is no ``tool``."""
    return None if shutil.which(tool) else {"outcome": "left out", "reason": f"{tool} was not found"}


def trials(out: Path, seconds: float, dry: bool) -> dict:
    """Every op's trial, as many at a time as there are cores."""
    environment = interpreted() if dry else None
    command = [sys.executable, "-m", MODULE]
    command += ["--op", "geglu"] if dry else ["--jobs", str(len(os.sched_getaffinity(0)))]
    code, took = run_logged(command, out / "trials.log", seconds, environment)
    found = [json.loads(line) for line in (out / "trials.log").read_text().splitlines() if line.startswith('{"op"')]
    return outcome(code, seconds, took, "trials.log") | {"ops": {each.pop("op"): each for each in found}}


def sanitizer(out: Path, seconds: float, dry: bool) -> dict:
    """memcheck on the small calls of the attention ops; what they compile, the trials have compiled before."""
    if missing := absent("compute-sanitizer"):
        return missing
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", MODULE]
    for op in ("geglu",) if dry else SANITIZED:
        command += ["--op", op]
    environment = interpreted() if dry else None
    return outcome(*_timed(command, out, "sanitizer.log", seconds, environment))


def counters(out: Path, seconds: float, dry: bool) -> dict:
    """Nsight Compute on one launch of both sweeps of grid attention, at the size of the headline; clocks stay as they are."""
    if missing := absent("ncu"):
        return missing
    command = ["ncu", "--set", "full", "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "2"]
    command += ["--kernel-name", f"regex:{SWEEPS}", "--force-overwrite", "--export", str(out / "sweeps")]
    command += ["--page", "details", "--print-details", "all"]
    command += [sys.executable, "benchmarks/gpu_battery.py", "--profile", PROFILED, "--iterations", "1"]
    command += ["--device", "cpu"] if dry else []
    return outcome(*_timed(command, out, "sweeps.log", seconds, None)) | {"report": "sweeps.ncu-rep"}


def tuner(out: Path, seconds: float, dry: bool) -> dict:
    """The tile shapes of grid attention's kernels, into ``out``/configs.json: this checkout keeps its own."""
    command = [sys.executable, "-m", "perceiver_fast.kernels.tune", "--out", str(out / "configs.json")]
    command += ["--seconds", f"{seconds - 5:.0f}"]
    for name in TUNED[:1] if dry else TUNED:
        command += ["--kernel", name]
    command += ["--dry-run", "--arch", "90", "--limit", "2"] if dry else []
    return outcome(*_timed(command, out, "tuner.log", seconds, None)) | {"table": "configs.json"}


def _timed(command, out, log, seconds, environment) -> tuple[int | None, float, float, str]:
    code, took = run_logged(command, out / log, seconds, environment)
    return code, seconds, took, log
