"""The command lines of profilers that look at a process from outside: nsys, ncu and Linux perf.

Each runs perceiver_fast.commands.profile_workload and records its marked region alone. Command lines are made here and
nowhere else, so that what is printed is what runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from perceiver_fast.commands.profile_metrics import SECTIONS, kernel_filter, names
from perceiver_fast.commands.profile_workload import Workload


@dataclass(frozen=True)
class Step:
    """One command line, and the file that its standard output goes to, if any."""

    command: list[str]
    output: Path | None = None

    def __str__(self) -> str:
        text = shlex.join(self.command)
        return text if self.output is None else f"{text} > {shlex.quote(str(self.output))}"


@dataclass(frozen=True)
class Recipe:
    """What a tool does, step by step, and the files that it leaves."""

    steps: list[Step]
    files: list[Path]


def nsys(workload: Workload, folder: Path, kernel: str | None = None) -> Recipe:
    """A timeline of kernels and ranges, and tables of both."""
    base, report = folder / workload.name, folder / f"{workload.name}.nsys-rep"
    record = "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --capture-range-end=stop".split()
    record += ["--sample=none", "--cpuctxsw=none", "--force-overwrite=true", f"--output={base}", *workload.command()]
    tables = "nsys stats --force-export=true --report=cuda_gpu_kern_sum,nvtx_sum,nvtx_gpu_proj_sum".split()
    return Recipe([Step(record), Step([*tables, str(report)])], [report])


def ncu(workload: Workload, folder: Path, kernel: str | None = None) -> Recipe:
    """Metrics of the chosen kernels' every launch, and all of them as CSV; by default, kernels of this package."""
    report, table = (folder / f"{workload.name}.{ending}" for ending in ("ncu-rep", "ncu.csv"))
    record = "ncu --profile-from-start off --target-processes all --nvtx".split()
    if kernel is not None or workload.peer == "fast":
        record += ["--kernel-name", f"regex:{kernel_filter(kernel)}"]
    for section in SECTIONS:
        record += ["--section", section]
    record += ["--metrics", names(), "--force-overwrite", "--export", str(report), *workload.command()]
    export = [*"ncu --csv --page raw --print-units base --import".split(), str(report)]
    return Recipe([Step(record), Step(export, table)], [report, table])


def perf(workload: Workload, folder: Path, kernel: str | None = None) -> Recipe:
    """Samples of the CPU, by library and function; no hardware counter is needed."""
    data, *pair = (str(folder / f"{workload.name}.perf.{ending}") for ending in ("data", "ctl", "ack"))
    fifos = ",".join(pair)
    record = ["perf", "record", "--delay=-1", f"--control=fifo:{fifos}", "--freq=997", f"--output={data}", "--"]
    record += ["env", "ONEDNN_JIT_PROFILE=2", *workload.command(), "--perf-control", fifos]  # names oneDNN's products
    report = "perf report --stdio --no-children --percent-limit=0.5 --fields=overhead,dso,symbol".split()
    report += ["--column-widths=8,36,100", f"--input={data}"]
    remove = ["rm", "-f", *pair]  # what a run that was stopped left would block this one
    return Recipe([Step(step) for step in (remove, ["mkfifo", *pair], record, remove, report)], [Path(data)])


@dataclass(frozen=True)
class Tool:
    """A profiler: its recipe, the device it looks at, calls in its region by default, and where it comes from."""

    recipe: Callable[[Workload, Path, str | None], Recipe]
    device: str
    iterations: int
    source: str


# ncu runs every kernel many times over, so one iteration is enough; perf needs samples.
TOOLS = {
    "nsys": Tool(nsys, "cuda", 3, "NVIDIA Nsight Systems, https://developer.nvidia.com/nsight-systems"),
    "ncu": Tool(ncu, "cuda", 1, "NVIDIA Nsight Compute, https://developer.nvidia.com/nsight-compute"),
    "perf": Tool(perf, "cpu", 10, "the distribution's package linux-perf, perf or linux-tools"),
}


def missing(name: str) -> list[str]:
    """What stands in the way of a tool here; empty where it can run."""
    tool, reasons = TOOLS[name], []
    if shutil.which(name) is None:
        reasons.append(f"{name} was not found on PATH: install {tool.source}")
    if tool.device == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", which is not a CUDA build"
        reasons.append(f"there is no CUDA GPU for torch {torch.__version__}{built}")
    return reasons


def run(recipe: Recipe, as_json: bool) -> str | None:
    """Run a recipe's steps.

    Args:
        recipe: its files' folder exists.
        as_json: standard output is for JSON alone: what the tool says goes to standard error.

    Returns:
        None, or which step failed.
    """
    for step in recipe.steps:
        with step.output.open("w") if step.output else nullcontext(sys.stderr if as_json else None) as output:
            code = subprocess.run(step.command, check=False, stdout=output).returncode
        if code:
            return f"exit code {code} of {step}"
    return None
