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
def _instances(architecture: int) -> list[Instance]:
    return list(instances(architecture))


def _report(architecture: int, index: int) -> Report:
    """On the index-th instance of an architecture: in a process of its own, to which kernels do not travel."""
    instance = _instances(architecture)[index]
    compiled = aot.compile_instance(instance, architecture)
    found = aot.faults(instance, compiled, architecture)
    return Report(instance.name, instance.config, compiled, instance.exponentials, found)


def compile_all(architecture: int, jobs: int | None = None, indices: Sequence[int] | None = None) -> Iterator[Report]:
    """Compile all that ships for an architecture, in ``jobs`` processes: as many as there are cores, if not said.

    Args:
        indices: those of :func:`instances` to compile, if not all.
    """
    if indices is None:
        indices = range(sum(1 for _ in instances(architecture)))
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_report, itertools.repeat(architecture, len(indices)), indices)
