"""Where a workload's time goes by torch.profiler: a trace, and the time of every range.

A range's self time is what lies in no range within it, so that self times add up to the whole. The time of calls into
torch that no range of its own has is in the self time of the range around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType

from perceiver_fast.commands.console import wide_console
from perceiver_fast.commands.profile_workload import BACKWARD, FORWARD, PROFILED, Prepared, Workload, iterate, warm_up
from perceiver_fast.ranges import OPS, ranges

PASSES = (PROFILED, FORWARD, BACKWARD)


@dataclass
class RangeTime:
    """The time of all ranges of one name, an iteration: microseconds on the CPU's clock, and of kernels on a GPU.

    Args:
        name: of the range.
        kind: ``pass``, ``layer`` or ``op``.
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
    cuda_total_us: float | None = None
    cuda_self_us: float | None = None


def _kind(name: str) -> str:
    return "pass" if name in PASSES else "op" if name in OPS else "layer"


def _parents(events: Sequence) -> dict[int, object]:
    """For every range the one around it, or None.

    The backward of a GPU runs in a thread of its own: there the range around is the shortest that is open meanwhile in
    the thread that waits for it.
    """
    marks = {id(event) for event in events}
    parents = {}
    for event in events:
        parent = event.cpu_parent
        while parent is not None and id(parent) not in marks:
            parent = parent.cpu_parent
        parents[id(event)] = parent
    waiting = [event for event in events if event.name in PASSES]
    for event in events:
        if parents[id(event)] is None and event.name not in PASSES:
            start, end = event.time_range.start, event.time_range.end
            around = [w for w in waiting if w.time_range.start <= start and end <= w.time_range.end]
            parents[id(event)] = min(around, key=lambda w: w.time_range.elapsed_us(), default=None)
    return parents


def range_times(events: Iterable, iterations: int, cuda: bool) -> list[RangeTime]:
    """The time of every name of a range: passes first, then layers as they come, then ops by their own time.

    Args:
        events: of ``torch.profiler.profile.events()``; the range ``profiled`` is the whole.
        iterations: in the whole.
        cuda: whether kernels' times are there.
    """
    events = [e for e in events if e.is_user_annotation and e.device_type == DeviceType.CPU]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    parents, times = _parents(events), {}
    whole = sum(event.time_range.elapsed_us() for event in events if event.name == PROFILED)
    for event in events:
        time = times.setdefault(event.name, RangeTime(event.name, _kind(event.name)))
        elapsed, parent = event.time_range.elapsed_us() / iterations, parents[id(event)]
        kernels = event.device_time_total / iterations if cuda else None
        time.calls += 1
        time.self_us += elapsed
        if cuda:
            time.cuda_self_us = (time.cuda_self_us or 0.0) + kernels
        if parent is not None:
            times[parent.name].self_us -= elapsed
            if cuda:
                times[parent.name].cuda_self_us -= kernels if parent.thread == event.thread else 0.0
        while parent is not None and parent.name != event.name:
            parent = parents[id(parent)]
        if parent is None:  # not within one of its own name
            time.total_us += elapsed
            if cuda:
                time.cuda_total_us = (time.cuda_total_us or 0.0) + kernels
    for time in times.values():
        time.share = time.self_us * iterations / whole
        time.calls /= 1 if time.name == PROFILED else iterations
    by_kind = {kind: [time for time in times.values() if time.kind == kind] for kind in ("pass", "layer", "op")}
    by_kind["op"].sort(key=lambda time: -time.self_us)
    return [time for kind in by_kind.values() for time in kind]


def profile(prepared: Prepared, workload: Workload, folder: Path) -> dict:
    """Run the workload under torch.profiler.

    Args:
        prepared, workload: the model and how often it runs.
        folder: where the trace goes; it exists.

    Returns:
        dict: ``ranges``, a list of dicts of :class:`RangeTime`'s fields, and ``trace``, the path of a Chrome trace
        (chrome://tracing, https://ui.perfetto.dev).
    """
    cuda = workload.device == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with ranges(prepared.model):
        warm_up(prepared)
        with torch.profiler.profile(activities=activities) as profiler:
            iterate(prepared, workload.iterations)
    trace = folder / f"{workload.name}.trace.json"
    profiler.export_chrome_trace(str(trace))
    times = range_times(profiler.events(), workload.iterations, cuda)
    return {"ranges": [asdict(time) for time in times], "trace": str(trace)}


def show(result: dict, title: str) -> None:
    """Print :func:`profile`'s result for people."""
    from rich.markup import escape
    from rich.table import Table

    cuda = any(time["cuda_total_us"] is not None for time in result["ranges"])
    table = Table(title=title, caption="an iteration; self: in no range within; share: of self, in the whole")
    table.add_column("range", no_wrap=True)
    for name in ("calls", "total ms", "self ms", "share", *(["CUDA ms", "CUDA self ms"] if cuda else [])):
        table.add_column(name, justify="right")
    previous = None
    for time in result["ranges"]:
        if time["kind"] != previous:
            table.add_section()
        previous = time["kind"]
        numbers = [f"{time['calls']:g}", _ms(time["total_us"]), _ms(time["self_us"]), f"{time['share']:.1%}"]
        numbers += [_ms(time["cuda_total_us"]), _ms(time["cuda_self_us"])] if cuda else []
        table.add_row(escape(time["name"]), *numbers)
    wide_console().print(table)


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1000:.3f}"
