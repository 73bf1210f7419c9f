"""Mixing of the latents by a feed-forward over them, in place of self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_fast.ranges import layer_range


class Mixer(nn.Sequential):
    """A Sequential that profilers show as one named range, see :class:`perceiver_fast.ranges`."""

    @layer_range
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def mixer(num_latents: int, mult: int = 4, dropout: float = 0.0) -> Mixer:
    """A layer from ``[B, N, D]`` to ``[B, N, D]``: every channel's N values through one feed-forward of width mult N.

    Args:
        num_latents: number of latents, N.
        mult: width of the hidden layer over N. Default: 4.
        dropout: dropout of the hidden layer in training. Default: 0.

    Source:
        perceiver-pytorch 0.11.0; after Tolstikhin et al., "MLP-Mixer", 2021.
    """
    return Mixer(
        nn.Conv1d(num_latents, num_latents * mult, 1),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Conv1d(num_latents * mult, num_latents, 1),
    )
