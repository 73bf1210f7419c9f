"""Grid attention's sweeps in CUDA C++ (csrc/cuda/grid_attention_*.cuh), between the Triton kernels that prepare and merge.

They take bfloat16 channels of an image, build what tensor cores multiply in the block, and leave the same partial sums
as the Triton sweeps. The op's declaration says which calls are theirs (perceiver_fast/ops/grid_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perceiver_fast.backends import Choice
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.grid import Grid
from perceiver_fast.ops.grid_attention import GRID_ATTENTION, GridAttentionCall

FORWARD = Config(queries=128, tokens=32, warps=4, registers=168)  # what grid_attention_tiles.cuh fixes


@dataclass(frozen=True)
class Sweep:
    """A call of an operator of the CUDA library, among :class:`perceiver_fast.kernels.launch.Launch` to run."""

    operator: str
    arguments: tuple[object, ...]

    def run(self) -> None:
        getattr(torch.ops.perceiver_fast, self.operator)(*self.arguments)


def chosen(grid: Grid, feat: Tensor, dropout: float) -> bool:
    """Whether the op's declaration gives this call to the CUDA kernels."""
    half = feat.dtype if feat.dtype != torch.float32 else None
    call = GridAttentionCall(torch.float32, feat.device, grid.sizes, grid.features, half=half, dropout=dropout)
    choice: Choice = GRID_ATTENTION.choose(call)
    return choice.backend == "cuda"


def padded(columns: int) -> int:
    """Columns in memory of sums by column: whole tiles."""
    return -(-columns // FORWARD.tokens) * FORWARD.tokens
