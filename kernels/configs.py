"""Which tile shapes the Triton kernels use on which architecture: fixed, so that no first call pays for a search.

``configs.json`` holds one entry a kernel and architecture (compute capability as sm_XY writes it). A GPU uses the entry of
the newest architecture that is not newer than itself. ``python -m perceiver_fast.kernels.tune`` writes it anew on a GPU.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("configs.json")
ARCHITECTURES = (80, 86, 90, 100)

MOST = 255  # registers a thread can have


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
    def options(self) -> dict[str, int | None]:
        """What a launch passes beside the tile."""
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers)


@functools.cache
def table() -> dict[str, dict[int, Config]]:
    """All configurations, by kernel and architecture."""
    entries = json.loads(TABLE.read_text())
    return {name: {int(arch): Config(**c) for arch, c in archs.items()} for name, archs in entries.items()}


@functools.cache
def config(kernel: str, architecture: int) -> Config:
    """The configuration of ``kernel`` for an architecture (90 for compute capability 9.0).

    Raises:
        ValueError: the architecture is older than all that the table knows.
    """
    known = [arch for arch in table()[kernel] if arch <= architecture]
    if not known:
        raise ValueError(
            f"{kernel}: expected an architecture of at least sm_{min(table()[kernel])}, got {architecture}"
        )
    return table()[kernel][max(known)]
