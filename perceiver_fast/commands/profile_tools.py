"""The command lines of profilers that look at a process from outside: nsys, ncu and Linux perf.

Each runs perceiver_fast.commands.profile_workload and records its marked region alone. Command lines are made here and
nowhere else, a shell runs them, and so what is printed is what runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from perceiver_fast.commands.profile_workload import Workload
from perceiver_fast.insight.ncu import SECTIONS, kernel_filter, names


@dataclass(frozen=True)
class Tool:
    """A profiler.

    Args:
        device: what it looks at.
        iterations: calls in its region by default.
        source: where it comes from.
        lines: what it runs. ``{base}`` is the path of its files up to their endings, ``{workload}`` the command that is
            profiled, ``{fifos}`` perf's, ``{what}`` which kernels and metrics ncu records.
        endings: of the files that it leaves.
    """

    device: str
    iterations: int
    source: str
    lines: tuple[str, ...]
    endings: tuple[str, ...]


TOOLS = {
    "nsys": Tool(  # a timeline of kernels and ranges, and tables of both
        "cuda", 3, "NVIDIA Nsight Systems, https://developer.nvidia.com/nsight-systems",
        (
            "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop --sample=none "
            "--cpuctxsw=none --force-overwrite=true --output={base} {workload}",
            "nsys stats --force-export=true --report=cuda_gpu_kern_sum,nvtx_sum,nvtx_gpu_proj_sum {base}.nsys-rep",
        ),
        ("nsys-rep",),
    ),
    "ncu": Tool(  # metrics of every launch, and all of them as CSV; runs every kernel many times over: one call is enough
        "cuda", 1, "NVIDIA Nsight Compute, https://developer.nvidia.com/nsight-compute",
        (
            "ncu --profile-from-start off --target-processes all --nvtx {what} --force-overwrite "
            "--export {base}.ncu-rep {workload}",
            "ncu --import {base}.ncu-rep --csv --page raw --print-units base > {base}.ncu.csv",
        ),
        ("ncu-rep", "ncu.csv"),
    ),
    "perf": Tool(  # samples by library and function, for which it needs many calls, but no hardware counter
        "cpu", 10, "the distribution's package linux-perf, perf or linux-tools",
        (
            "rm -f {base}.perf.ctl {base}.perf.ack",  # what a run that was stopped left would block this one
            "mkfifo {base}.perf.ctl {base}.perf.ack",
            "perf record --delay=-1 --control=fifo:{fifos} --freq=997 --output={base}.perf.data -- "
            "env ONEDNN_JIT_PROFILE=2 {workload} --perf-control {fifos}",  # the variable names oneDNN's products
            "rm -f {base}.perf.ctl {base}.perf.ack",
            "perf report --stdio --no-children --percent-limit=0.5 --fields=overhead,dso,symbol "
            "--column-widths=8,36,100 --input={base}.perf.data",
        ),
        ("perf.data",),
    ),
}  # fmt: skip


def command_lines(tool: Tool, workload: Workload, folder: Path, kernel: str | None = None) -> list[str]:
    """What a shell is given, line by line. ``kernel`` is of ncu: see :func:`kernel_filter`."""
    base = shlex.quote(str(folder / workload.name))
    what = [word for section in SECTIONS for word in ("--section", section)] + ["--metrics", names()]
    if kernel is not None or workload.peer == "fast":  # of a peer all kernels
        what += ["--kernel-name", f"regex:{kernel_filter(kernel)}"]
    values = {"base": base, "fifos": f"{base}.perf.ctl,{base}.perf.ack"}
    values |= {"workload": shlex.join(workload.command()), "what": shlex.join(what)}
    return [line.format(**values) for line in tool.lines]


def missing(name: str) -> list[str]:
    """What stands in the way of a tool here; empty where it can run."""
    reasons = []
    if shutil.which(name) is None:
        reasons.append(f"{name} was not found on PATH: install {TOOLS[name].source}")
    if TOOLS[name].device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", which is not a CUDA build"
        reasons.append(f"there is no CUDA GPU for torch {torch.__version__}{built}")
    return reasons


def run(lines: list[str], as_json: bool) -> str | None:
    """Run command lines, and say which failed, if any.

    Args:
        lines: their files' folder exists.
        as_json: standard output is for JSON alone: what the tool says goes to standard error.
    """
    for line in lines:
        sys.stdout.flush()
        code = subprocess.run(line, shell=True, check=False, stdout=sys.stderr if as_json else None).returncode
        if code:
            return f"exit code {code} of {line}"
    return None
