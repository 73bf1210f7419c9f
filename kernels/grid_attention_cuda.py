"""Grid attention's sweeps in CUDA C++ (csrc/cuda/grid_attention_*.cuh), beside Triton's and with the same partial sums.

They take half-precision channels of an image and build what tensor cores multiply in the block, so that no kernel describes the
tokens before. The op's declaration says which calls are theirs (perceiver_fast/ops/grid_attention.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from perceiver_fast.kernels.configs import Config

BACKWARD = Config(queries=128, tokens=32, warps=4, registers=255)  # the tile of csrc/cuda/grid_attention_tiles.cuh


@dataclass(frozen=True)
class Sweep:
    """A call of an operator of the CUDA library, to be run among launches of Triton's kernels."""

    operator: str
    arguments: tuple[object, ...]

    def run(self) -> None:
        getattr(torch.ops.perceiver_fast, self.operator)(*self.arguments)


def forward_config(architecture: int) -> Config:
    """The forward's tile, and the registers it is bounded to: kForwardBlocks of grid_attention_tiles.cuh."""
    return replace(BACKWARD, registers=168 if architecture < 100 else 255)


def padded(columns: int) -> int:
    """Columns in memory of sums by column: whole tiles."""
    return -(-columns // BACKWARD.tokens) * BACKWARD.tokens
