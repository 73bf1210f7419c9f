"""Which tile shapes the Triton kernels use on which architecture: fixed, so that no first call pays for a search.

``configs.json`` holds one entry a kernel and architecture (compute capability as sm_XY writes it). A GPU uses the entry of
the newest architecture that is not newer than itself. ``python -m perceiver_fast.kernels.tune`` writes it anew on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_name("configs.json")
ARCHITECTURES = (80, 86, 90, 100)

MOST = 255  # registers a thread can have
REGISTERS = 1 << 16  # of a multiprocessor; threads take them by eights


@dataclass(frozen=True)
class Config:
    """The tile a program holds and the resources it is compiled for.

    ``queries`` x ``tokens`` is the tile of attention weights; ``warps``, ``stages`` and ``registers`` (the most a thread
    may have) are Triton's num_warps, num_stages and maxnreg. Without the last, ptxas weighs a few spills against one more
    block a multiprocessor.
    """

    queries: int
    tokens: int
    warps: int
    stages: int = 1
    registers: int | None = None

    @property
    def resident(self) -> int:
        """How many of its programs a multiprocessor surely holds: as many as its registers suffice for."""
        return max(1, REGISTERS // (32 * self.warps * math.ceil((self.registers or MOST) / 8) * 8))

    @property
    def options(self) -> dict[str, int | None]:
        """What a launch passes beside the tile."""
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers)


@functools.cache
def table() -> dict[str, dict[int, Config]]:
    """All configurations, by kernel and architecture."""
    entries = json.loads(TABLE.read_text())
    return {name: {int(arch): Config(**c) for arch, c in archs.items()} for name, archs in entries.items()}


def write(table: Mapping[str, Mapping[int, Config]], file: Path | str) -> None:
    """Write ``table`` as ``configs.json`` is written: in order, a line an architecture, without what is the default.

    The file is there whole or as it was, whenever the process ends.
    """
    kernels = []
    for name, archs in sorted(table.items()):
        given = {
            arch: {f.name: getattr(c, f.name) for f in fields(c) if getattr(c, f.name) != f.default}
            for arch, c in sorted(archs.items())
        }
        lines = ",\n".join(f'    "{arch}": {json.dumps(values)}' for arch, values in given.items())
        kernels.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    new = Path(f"{file}.new")
    new.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    os.replace(new, file)


_overrides: ContextVar[Mapping[str, Config]] = ContextVar("overrides", default={})


@contextlib.contextmanager
def overridden(configs: Mapping[str, Config]) -> Iterator[None]:
    """Within, and in this thread, the kernels named use these configurations on every architecture."""
    token = _overrides.set({**_overrides.get(), **configs})
    try:
        yield
    finally:
        _overrides.reset(token)


def config(kernel: str, architecture: int) -> Config:
    """The configuration of ``kernel`` for an architecture (90 for compute capability 9.0).

    Raises:
        ValueError: the architecture is older than all that the table knows.
    """
    return _overrides.get().get(kernel) or _listed(kernel, architecture)


@functools.cache
def _listed(kernel: str, architecture: int) -> Config:
    known = [arch for arch in table()[kernel] if arch <= architecture]
    if not known:
        raise ValueError(
            f"{kernel}: expected an architecture of at least sm_{min(table()[kernel])}, got {architecture}"
        )
    return table()[kernel][max(known)]
