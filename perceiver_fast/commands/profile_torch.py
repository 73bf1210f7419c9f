"""Where a workload's time goes by torch.profiler: a trace, and the time of every range.

A range's self time is what lies in no range within it, so that self times add up to the whole. The time of calls into
torch that no range of its own has is in the self time of the range around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from perceiver_fast.commands.profile_workload import BACKWARD, FORWARD, PROFILED, Prepared
from perceiver_fast.insight.console import plain_table, wide_console
from perceiver_fast.ranges import OPS, ranges

PASSES = (PROFILED, FORWARD, BACKWARD)
KINDS = ("pass", "layer", "op")


@dataclass
class RangeTime:
    """The time of all ranges of one name, an iteration: microseconds on the CPU's clock, and of kernels on a GPU.

    Args:
        name: of the range.
        kind: of KINDS.
        calls: ranges of the name; of ``profiled``, which is around all iterations, one.
        total_us: time of the ranges, those within one of the same name left out.
        self_us: of that, what lies in no other range.
        share: self_us over the time of all iterations.
        cuda_total_us, cuda_self_us: the same of kernels; None without a GPU.
    """

    name: str
    kind: str
    calls: float = 0.0
    total_us: float = 0.0
    self_us: float = 0.0
    share: float = 0.0
    cuda_total_us: float | None = 0.0
    cuda_self_us: float | None = 0.0


def _nested(events: Iterable[FunctionEvent]) -> Iterator[tuple[FunctionEvent, list[FunctionEvent]]]:
    """Every range as it begins, with the ranges around it, the innermost last.

    The backward of a GPU runs in a thread of its own. What is around its ranges are those that are open meanwhile in the
    thread that waits for it, where ``profiled`` began before all others.
    """
    found = [event for event in events if event.is_user_annotation and event.device_type == DeviceType.CPU]
    found.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    open_in: dict[int, list[FunctionEvent]] = defaultdict(list)
    for event in found:
        for opened in open_in.values():
            while opened and opened[-1].time_range.end <= event.time_range.start:
                opened.pop()
        yield event, open_in[event.thread] or open_in[found[0].thread]
        open_in[event.thread].append(event)


def range_times(events: Iterable[FunctionEvent], iterations: int, cuda: bool) -> list[RangeTime]:
    """The time of every name of a range: passes first, then layers as they come, then ops by their own time.

    Args:
        events: of ``torch.profiler.profile.events()``; the range ``profiled`` is the whole.
        iterations: in the whole.
        cuda: whether kernels' times are there.
    """
    times: dict[str, RangeTime] = {}
    for event, around in _nested(events):
        name, elapsed = event.name, event.time_range.elapsed_us() / iterations
        kernels = event.device_time_total / iterations if cuda else 0.0
        kind = "pass" if name in PASSES else "op" if name in OPS else "layer"
        time: Any = times.setdefault(name, RangeTime(name, kind))
        time.calls += 1
        time.self_us += elapsed
        time.cuda_self_us += kernels
        if around:
            outer: Any = times[around[-1].name]
            outer.self_us -= elapsed
            if around[-1].thread == event.thread:  # what another thread launches is not in its kernels' time
                outer.cuda_self_us -= kernels
        if name not in [other.name for other in around]:
            time.total_us += elapsed
            time.cuda_total_us += kernels
    for name, time in times.items():
        time.calls /= 1 if name == PROFILED else iterations
        time.share = time.self_us / times[PROFILED].total_us
        if not cuda:
            time.cuda_total_us = time.cuda_self_us = None
    return sorted(times.values(), key=lambda t: (KINDS.index(t.kind), -t.self_us if t.kind == "op" else 0))


def profile(prepared: Prepared, folder: Path) -> dict:
    """Run a workload under torch.profiler.

    Args:
        prepared: the model and how often it runs.
        folder: where the trace goes; it exists.

    Returns:
        dict: ``ranges``, a list of dicts of :class:`RangeTime`'s fields, and ``trace``, the path of a Chrome trace
        (chrome://tracing, https://ui.perfetto.dev).
    """
    workload = prepared.workload
    cuda = workload.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with ranges(prepared.model):
        prepared.warm_up()
        with torch.profiler.profile(activities=activities) as profiler:
            prepared.iterate()
    trace = folder / f"{workload.name}.trace.json"
    profiler.export_chrome_trace(str(trace))
    times = range_times(profiler.events(), workload.iterations, cuda)
    return {"ranges": [asdict(time) for time in times], "trace": str(trace)}


def show(result: dict, title: str) -> None:
    """Print :func:`profile`'s result for people."""
    columns = {"total ms": "total_us", "self ms": "self_us", "CUDA ms": "cuda_total_us", "CUDA self ms": "cuda_self_us"}
    columns = {header: field for header, field in columns.items() if result["ranges"][0][field] is not None}
    caption = "an iteration; self: in no range within; share: of self, in the whole"
    table = plain_table("range", numbers=("calls", *columns, "share"), title=title, caption=caption)
    previous = None
    for time in result["ranges"]:
        if time["kind"] != previous:
            table.add_section()
        previous = time["kind"]
        milliseconds = (f"{time[field] / 1000:.3f}" for field in columns.values())
        table.add_row(escape(time["name"]), f"{time['calls']:g}", *milliseconds, f"{time['share']:.1%}")
    wide_console().print(table)
