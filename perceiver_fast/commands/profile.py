"""Where a model's time goes, by layer, op and kernel: torch's profiler, nsys, ncu or Linux perf."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from perceiver_fast.commands import profile_tools
from perceiver_fast.commands.profile_tools import TOOLS
from perceiver_fast.commands.profile_workload import CannotRun, Workload, prepare, workload_from
from perceiver_fast.commands.profile_workload import add_arguments as add_workload_arguments

ITERATIONS = 3  # of torch's profiler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__
    parser.epilog = "Exit code: 0; 2 when the tool, the GPU or the peer is not there, or the tool fails."
    parser.add_argument(
        "--tool",
        choices=("torch", *TOOLS),
        default="torch",
        help="torch: a table of ranges and a trace, on CPU and GPU (default). nsys: a GPU's timeline; ncu: metrics of "
        "every kernel. perf: functions on the CPU. These print their command lines and run them if they can",
    )
    add_workload_arguments(parser)
    add = parser.add_argument
    add("--kernel", metavar="REGEX", help="of ncu: kernels to profile, or an op's name (default: all of this package)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where files go (default: %(default)s)")
    add("--dry-run", action="store_true", help="of nsys, ncu and perf: print the command lines, run nothing")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        _check(args)
        if not args.dry_run:
            args.out.mkdir(parents=True, exist_ok=True)
        return _run_torch(args) if args.tool == "torch" else _run_tool(args)
    except BrokenPipeError:
        raise  # whoever read has seen enough
    except (CannotRun, OSError) as reason:
        print(f"profile: {reason}", file=sys.stderr)
        return 2


def _check(args: argparse.Namespace) -> None:
    tool = TOOLS.get(args.tool)
    if args.kernel is not None and args.tool != "ncu":
        raise CannotRun(f"--kernel is ncu's: expected --tool ncu with it, got {args.tool}")
    if args.dry_run and tool is None:
        raise CannotRun("--dry-run prints other tools' command lines: expected --tool nsys, ncu or perf, got torch")
    if tool is not None and args.device not in (None, tool.device):
        raise CannotRun(f"{args.tool} looks at {tool.device}: expected no other --device, got {args.device}")


def _conditions(workload: Workload) -> dict:
    """What ran, where."""
    import perceiver_fast
    from perceiver_fast.insight.environment import cpu_name

    cuda = workload.device == "cuda"
    return {
        "geometry": workload.geometry,
        "tiny": workload.tiny,
        "pass": workload.pass_name,
        "dtype": workload.dtype,
        "batch": workload.batch,
        "peer": workload.peer,
        "iterations": workload.iterations,
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "perceiver_fast": perceiver_fast.__version__,
    }


def _run_torch(args: argparse.Namespace) -> int:
    from rich.console import Console

    from perceiver_fast.commands import profile_torch

    workload = workload_from(args, ITERATIONS, "cuda" if torch.cuda.is_available() else "cpu")
    with Console(stderr=True).status(f"profiling {workload.name}"):
        prepared = prepare(workload)
        result = profile_torch.profile(prepared, workload, args.out)
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


def _run_tool(args: argparse.Namespace) -> int:
    tool = TOOLS[args.tool]
    recipe = tool.recipe(workload_from(args, tool.iterations, tool.device), args.out, args.kernel)
    reasons = profile_tools.missing(args.tool)
    if not args.json:
        print("\n".join(map(str, recipe.steps)), flush=True)
    ready = not args.dry_run and not reasons
    failed = profile_tools.run(recipe, args.json) if ready else None
    ran = ready and failed is None
    if args.json:
        commands, files = [str(step) for step in recipe.steps], [str(path) for path in recipe.files]
        record = {"tool": args.tool, "commands": commands, "missing": reasons, "ran": ran, "files": files}
        print(json.dumps(record, indent=2))
    elif ran:
        print("Files: " + ", ".join(map(str, recipe.files)))
    if args.dry_run:
        return 0
    for reason in [*reasons, *([failed] if failed else [])]:
        print(f"profile --tool {args.tool}: {reason}", file=sys.stderr)
    return 0 if ran else 2
