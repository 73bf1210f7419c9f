"""Finds the tile shapes of the Triton kernels that are fastest on this GPU, and writes them into configs.json.

    python -m perceiver_fast.kernels.tune --help

Every entry's candidates lie around its shipped configuration. They are compiled ahead of time, and those that spill,
trap or pass a budget never run; the others must compute what the shipped one does, and are timed with device events.
docs/tuning.md is the manual.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perceiver_fast.gpu import INTERPRETED
from perceiver_fast.kernels import aot
from perceiver_fast.kernels.configs import ARCHITECTURES, TABLE, Config, config, table, write
from perceiver_fast.kernels.tune_candidates import (
    BATCH,
    Need,
    OutOfTime,
    calls_of,
    candidates,
    choose,
    compile_candidate,
    distinct,
)


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(
        prog="python -m perceiver_fast.kernels.tune",
        description="Find the tile shapes of the Triton kernels that are fastest on this GPU, and write them into "
        "configs.json. Candidates are compiled ahead of time first; those that spill or trap never run.",
    )
    add = top.add_argument
    add(
        "--kernel", action="append", metavar="PATTERN", default=[],
        help="only these entries of configs.json; * and ? stand for any characters; may be repeated (default: all)",
    )  # fmt: skip
    add(
        "--arch", type=int, choices=sorted(aot.SHARED),
        help="the architecture whose entries are written, 90 for sm_90 (default: this GPU's)",
    )  # fmt: skip
    add("--out", type=Path, default=TABLE, metavar="FILE", help="what is written (default: %(default)s)")
    add("--dry-run", action="store_true", help="list what would be timed; write nothing. Needs no GPU")
    add("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compiling processes (default: %(default)s)")
    add("--seconds", type=float, default=math.inf, help="stop after about so many; what is done is kept")
    add("--limit", type=int, metavar="N", help="at most N candidates an entry, the nearest to the shipped")
    return top


def checked(top: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[int, list[str]]:
    """Architecture and entries; ends the process where the arguments, or this machine, do not allow the run."""
    gpu = torch.cuda.is_available() and torch.version.cuda is not None
    if INTERPRETED:
        top.error("expected to compile kernels, found TRITON_INTERPRET=1, which interprets them; unset it")
    if not gpu and not args.dry_run:
        top.error(
            f"expected an NVIDIA GPU to time the kernels on, found none that torch {torch.__version__} can use; run "
            "this where there is one, or add --dry-run --arch 90 to see what compiles"
        )
    major, minor = torch.cuda.get_device_capability(0) if gpu else (0, 0)
    arch, known = args.arch or 10 * major + minor, ", ".join(map(str, sorted(aot.SHARED)))
    if arch not in aot.SHARED:
        found = f"a GPU of sm_{arch}" if gpu else "neither it nor a GPU"
        top.error(f"expected --arch to be one of {known}, found {found}; name the one whose entries are meant")
    if not args.dry_run and arch > 10 * major + minor:
        top.error(f"expected --arch of at most this GPU's, sm_{major}{minor}, found {arch}; --dry-run compiles for any")
    names: set[str] = set()
    for pattern in args.kernel or ["*"]:
        matched = fnmatch.filter(table(), pattern.replace("[", "[[]"))  # names hold brackets
        if not matched:
            there = ", ".join(sorted(table()))
            top.error(f"expected --kernel to match an entry, found {pattern!r}; there are: {there}")
        names.update(matched)
    if min(args.jobs, 1 if args.limit is None else args.limit) < 1:
        top.error("expected --jobs and --limit of at least 1")
    if not args.dry_run and not os.access(args.out.parent, os.W_OK):
        top.error(f"expected a folder to write to, found {args.out.parent}; name another file with --out")
    return arch, sorted(names)


def conditions(arch: int) -> dict[str, object]:
    """What the times depend on."""
    driver = "unknown: nvidia-smi was not found"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        driver = "unknown: nvidia-smi refused" if done.returncode else done.stdout.strip()
    device = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.name, "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count, "driver": driver, "cuda": torch.version.cuda,
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "entries written": f"sm_{arch}", "batch": BATCH,
    }  # fmt: skip


def put(entries: dict[int, Config], name: str, arch: int, new: Config) -> None:
    """Give an architecture ``new``. The next newer one, which may have had its entry from here, keeps what it has."""
    for newer in [a for a in ARCHITECTURES if a > arch][:1]:
        entries.setdefault(newer, config(name, newer))
    entries[arch] = new


def words(c: Config) -> str:
    registers = f", at most {c.registers} registers" if c.registers else ""
    return f"{c.queries} x {c.tokens}, {c.warps} warps, {c.stages} stage{'s' * (c.stages > 1)}{registers}"


def show(console: Console, name: str, needs: Sequence[Need]) -> None:
    """A table of the candidates that would be timed, and why the others would not."""
    kept, view = distinct(needs), Table(title=escape(name), title_justify="left")
    for column in ("tile", "warps", "stages", "most", "registers", "shared", "a pair", ""):
        view.add_column(column, justify="right", no_wrap=True)
    for need in kept:
        c, shipped = need.config, "shipped" if need is needs[0] else ""
        tile = (f"{c.queries} x {c.tokens}", str(c.warps), str(c.stages), str(c.registers or ""))
        numbers = (str(need.registers), f"{need.shared / 1024:.1f} KiB", f"{need.per_pair:.1f}")
        view.add_row(*tile, *(("", "", "") if need.faults else numbers), "; ".join((shipped, *need.faults)))
    console.print(view)
    reasons = Counter(re.sub(r"\d+", "n", need.faults[0]) for need in needs if need.faults)
    reasons["the same binary as another"] = sum(not n.faults for n in needs) - sum(not n.faults for n in kept)
    left_out = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common() if count) or "none"
    console.print(f"{len(kept)} of {len(needs)} candidates to be timed. Left out: {left_out}\n")


class Run:
    """One run over entries: processes that compile, progress, and what was found so far."""

    def __init__(self, args: argparse.Namespace, arch: int):
        self.args, self.arch = args, arch
        self.deadline = time.time() + args.seconds
        self.console = Console()
        self.status = self.console.status("")
        self.table = {name: dict(archs) for name, archs in table().items()}
        self.log = {} if args.dry_run else conditions(arch) | {"entries": {}}
        self.log_file = args.out.with_name(f"{args.out.stem}.{time.strftime('%Y%m%d-%H%M%S')}.json")

    def compile(self, name: str) -> list[Need]:
        """What every candidate of an entry needs, the shipped one first."""
        configs, needs = candidates(name, config(name, self.arch))[: self.args.limit], []
        work = partial(compile_candidate, name, calls_of(name, self.arch), self.arch, self.deadline)
        ours = (signal.signal, (signal.SIGINT, signal.SIG_IGN))  # an interrupt is this process's to handle
        try:
            with ProcessPoolExecutor(self.args.jobs, multiprocessing.get_context("spawn"), *ours) as pool:
                for need in pool.map(work, configs):
                    needs.append(need)
                    self.status.update(escape(f"{name}: compiled {len(needs)} of {len(configs)}"))
        except BrokenProcessPool:
            raise RuntimeError("a compiling process died; try fewer --jobs, memory may be short") from None
        return needs

    def entry(self, name: str) -> None:
        """Tune one entry, or list what there is to tune."""
        if time.time() > self.deadline:
            raise OutOfTime
        needs = self.compile(name)
        if self.args.dry_run:
            return show(self.console, name, needs)
        shipped, sound = needs[0].config, [need.config for need in distinct(needs)]
        self.status.update(escape(f"{name}: timing {len(sound)} candidates"))
        calls = calls_of(name, self.arch)
        kept, gain, times = choose(name, calls, sound, self.arch, torch.device("cuda"), self.deadline)
        if kept != shipped:
            put(self.table[name], name, self.arch, kept)
        compiled = [{key: value for key, value in asdict(need).items() if key != "code"} for need in needs]
        found = {"shipped": asdict(shipped), "kept": asdict(kept), "gain": gain, **times, "compiled": compiled}
        self.record(name, found)
        change = f"stays at {words(kept)}" if kept == shipped else f"{words(shipped)} -> {words(kept)}"
        self.console.print(f"{name}: {change} (best gain {gain:.1%})", markup=False)

    def record(self, name: str, found: dict) -> None:
        """Keep what was found, in the table and the log, before the next entry."""
        self.log["entries"][name] = found
        write(self.table, self.args.out)
        self.log_file.write_text(json.dumps(self.log, indent=1) + "\n")

    def all(self, names: Sequence[str]) -> int:
        """Tune all entries; the exit code."""
        code = 0
        with self.status:
            for done, name in enumerate(names):
                try:
                    self.entry(name)
                except (OutOfTime, KeyboardInterrupt) as stop:
                    why = f"{self.args.seconds:g} s are over"
                    if isinstance(stop, KeyboardInterrupt):
                        why, code = "interrupted", 130
                    self.console.print(f"{why}; not done: {', '.join(names[done:])}", markup=False)
                    break
                except Exception as error:  # of this entry's shipped configuration, or its compiling processes
                    code, failed = 1, f"{type(error).__name__}: {error}"
                    if not self.args.dry_run:
                        self.record(name, {"failed": failed})
                    self.console.print(f"{name}: left as it is, {failed}", markup=False)
        if self.log.get("entries"):
            self.console.print(f"Wrote {self.args.out} and {self.log_file}")
        return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tuner; returns the exit code: 0, 1 if entries failed, 2 for arguments or no GPU, 130 if interrupted."""
    top = parser()
    args = top.parse_args(argv)
    arch, names = checked(top, args)
    return Run(args, arch).all(names)


if __name__ == "__main__":
    sys.exit(main())
