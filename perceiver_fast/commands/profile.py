"""Where a model's time goes, by layer, op and kernel: torch's profiler, nsys, ncu or Linux perf."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import perceiver_fast
from perceiver_fast.commands import make_folder, profile_tools, profile_torch
from perceiver_fast.commands.profile_tools import TOOLS, Tool
from perceiver_fast.commands.profile_workload import Prepared, Workload, workload_from
from perceiver_fast.commands.profile_workload import add_arguments as add_workload_arguments
from perceiver_fast.insight.console import CannotRun, progress
from perceiver_fast.insight.machine import cpu_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    parser.epilog = "Exit code: 0; 2 when the tool, the GPU or the peer is not there, or the tool fails."
    add = parser.add_argument
    add(
        "--tool",
        choices=("torch", *TOOLS),
        default="torch",
        help="torch: a table of ranges and a trace, on CPU and GPU (default). nsys: a GPU's timeline; ncu: metrics of "
        "every kernel. perf: functions on the CPU. These print their command lines and run them if they can",
    )
    add_workload_arguments(parser)
    add("--kernel", metavar="REGEX", help="of ncu: kernels to profile, or an op's name (default: all of this package)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--dry-run", action="store_true", help="of nsys, ncu and perf: print the command lines, run nothing")
    add("--json", action="store_true", help="print JSON")


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
    if workload.device == "cpu" and not profile_tools.missing("perf"):
        print("By function of the kernels: --tool perf")
    return 0


def _run_tool(args: argparse.Namespace, tool: Tool) -> int:
    workload = workload_from(args, iterations=tool.iterations, device=tool.device)
    lines = profile_tools.command_lines(tool, workload, args.out, args.kernel)
    files = [str(args.out / f"{workload.name}.{ending}") for ending in tool.endings]
    missing = profile_tools.missing(args.tool)
    if not args.json:
        print("\n".join(lines), flush=True)
    ready = not args.dry_run and not missing
    failed = profile_tools.run(lines, args.json) if ready else None
    ran = ready and failed is None
    if args.json:
        record = {"tool": args.tool, "commands": lines, "missing": missing, "ran": ran, "files": files}
        print(json.dumps(record, indent=2))
    elif ran:
        print("Files: " + ", ".join(files))
    if args.dry_run:
        return 0
    for reason in missing if failed is None else [failed]:
        print(f"profile --tool {args.tool}: {reason}", file=sys.stderr)
    return 0 if ran else 2
