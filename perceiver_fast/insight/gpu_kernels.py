"""The Triton kernels that the declared ops ship, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from perceiver_fast.gpu import assumed
from perceiver_fast.kernels import aot
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.launch import Instance, collected
from perceiver_fast.ops.declaration import OPS, replaced

TOGETHER = 8  # kernels that are read at a time


def instances(architecture: int) -> Iterator[Instance]:
    """What the declared samples of all ops launch on an architecture, found by running them on tensors without content.

    Every variant of the kernels that hold attention weights, once; of those that hold none one for every tile shape and set of dtypes.
    """
    for op in OPS.values():
        seen: list[tuple] = []
        for name, options in op.instances.items():
            with assumed(architecture), collected() as launches:
                with replaced(lambda operator, arguments: operator.triton_kernel()(*arguments)):
                    op.run_sample("meta", **options)
            for launch in launches:
                instance = launch.instance(name)
                sizes = [value for value in instance.constants.values() if type(value) is int]  # of its tile
                variant = (instance.kernel, instance.types, instance.constants if instance.weights else sizes)
                if variant not in seen:
                    seen.append(variant)
                    yield instance


@dataclass(frozen=True)
class Report:
    """A kernel that ships, what it needs, and what is wrong with it; ``exponentials`` are what it has to compute a turn."""

    name: str
    config: Config
    compiled: aot.Compiled
    exponentials: int
    faults: list[str]

    def as_dict(self) -> dict[str, object]:
        """For a table or JSON; tile and instructions a weight are None for kernels that make no weights."""
        tile = f"{self.config.queries} x {self.config.tokens}" if self.exponentials else None
        per_weight = round(self.compiled.instructions / self.exponentials, 1) if self.exponentials else None
        return dict(
            kernel=self.name, tile=tile, warps=self.config.warps, registers=self.compiled.registers,
            shared=self.compiled.shared, instructions=per_weight, faults=self.faults,
        )  # fmt: skip


@functools.cache
def shipped(architecture: int) -> list[Instance]:
    """All of :func:`instances`, found once a process."""
    return list(instances(architecture))


def _reports(architecture: int, indices: Sequence[int]) -> list[Report]:
    """On some instances of an architecture: by their indices, since kernels do not travel to another process."""
    chosen = [shipped(architecture)[index] for index in indices]
    return [
        Report(
            instance.name,
            instance.config,
            compiled,
            instance.exponentials,
            aot.faults(instance, compiled, architecture),
        )
        for instance, compiled in zip(chosen, aot.compile_instances(chosen, architecture))
    ]


def compile_all(architecture: int, jobs: int | None = None, indices: Sequence[int] | None = None) -> Iterator[Report]:
    """Compile all that ships for an architecture, in ``jobs`` processes: as many as there are cores, if not said.

    Args:
        jobs: with 1 this process does it.
        indices: those of :func:`shipped` to compile, if not all.
    """
    if indices is None:
        indices = range(len(shipped(architecture)))
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    parts = [indices[at : at + TOGETHER] for at in range(0, len(indices), TOGETHER)]
    if jobs == 1:
        for part in parts:
            yield from _reports(architecture, part)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for reports in pool.map(_reports, itertools.repeat(architecture, len(parts)), parts):
            yield from reports
