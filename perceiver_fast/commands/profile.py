"""Where a model's time goes, by layer, op and kernel: torch's profiler, nsys, ncu or Linux perf."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import perceiver_fast
from perceiver_fast.commands import make_folder, profile_torch
from perceiver_fast.commands.profile_workload import Prepared, workload_from
from perceiver_fast.commands.workload import Workload
from perceiver_fast.insight.console import CannotRun, progress
from perceiver_fast.insight.environment import cpu_name
from perceiver_fast.insight.ncu import SECTIONS, kernel_filter, names


@dataclass(frozen=True)
class Tool:
    """A profiler that looks at a process from outside, the one of perceiver_fast.commands.profile_workload.

    It records the marked region alone. Command lines are made here and nowhere else, a shell runs them, and so what is
    printed is what runs.

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


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    tool = TOOLS.get(args.tool)
    if args.kernel is not None and args.tool != "ncu":
        raise CannotRun(f"--kernel is ncu's: expected --tool ncu with it, got {args.tool}")
    if args.dry_run and tool is None:
        raise CannotRun("--dry-run prints other tools' command lines: expected --tool nsys, ncu or perf, got torch")
    if tool is not None and args.device not in (None, tool.device):
        raise CannotRun(f"{args.tool} looks at {tool.device}: expected no other --device, got {args.device}")
    if not args.dry_run:
        make_folder(args.out)
    return _run_torch(args) if tool is None else _run_tool(args, tool)


def _conditions(workload: Workload) -> dict:
    """What ran, where."""
    chosen = asdict(workload)
    return {
        **{name.removesuffix("_name"): value for name, value in chosen.items()},
        "device": torch.cuda.get_device_name() if workload.device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "perceiver_fast": perceiver_fast.__version__,
    }


def _run_torch(args: argparse.Namespace) -> int:
    workload = workload_from(args)
    with progress() as say:
        say(f"profiling {workload.name}")
        result = profile_torch.profile(Prepared(workload), args.out)
    conditions = _conditions(workload)
    if args.json:
        print(json.dumps({"tool": "torch", "conditions": conditions, **result}, indent=2))
        return 0
    profile_torch.show(result, title=workload.name)
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    print(f"Trace, for chrome://tracing or https://ui.perfetto.dev: {result['trace']}")
    if workload.device == "cpu" and not missing("perf"):
        print("By function of the kernels: --tool perf")
    return 0


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


def _run_tool(args: argparse.Namespace, tool: Tool) -> int:
    """Print a tool's command lines and run them if it is there; with --json what it says goes to standard error."""
    workload = workload_from(args, iterations=tool.iterations, device=tool.device)
    lines = command_lines(tool, workload, args.out, args.kernel)
    files = [str(args.out / f"{workload.name}.{ending}") for ending in tool.endings]
    reasons = missing(args.tool)
    if not args.json:
        print("\n".join(lines), flush=True)
    problems, ready = list(reasons), not args.dry_run and not reasons
    for line in lines if ready else ():
        code = subprocess.run(line, shell=True, check=False, stdout=sys.stderr if args.json else None).returncode
        if code:
            problems.append(f"exit code {code} of {line}")
            break
    ran = ready and not problems
    if args.json:
        record = {"tool": args.tool, "commands": lines, "missing": reasons, "ran": ran, "files": files}
        print(json.dumps(record, indent=2))
    elif ran:
        print("Files: " + ", ".join(files))
    if args.dry_run:
        return 0
    for problem in problems:
        print(f"profile --tool {args.tool}: {problem}", file=sys.stderr)
    return 0 if ran else 2
