"""A GRU cell in place of a residual connection."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_fast.ranges import layer_range


class GRUGating(nn.Module):
    """``GRU(fn(x, ..), x)``: how much of a layer's output enters the latents is learned.

    Args:
        dim: channels of the latents, D.
        fn: layer from ``[B, N, D]`` to ``[B, N, D]``.

    Source:
        perceiver-pytorch 0.11.0; after Parisotto et al., "Stabilizing transformers for reinforcement learning", 2020.
    """

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.gru = nn.GRUCell(dim, dim)

    @layer_range
    def forward(self, x: Tensor, *args, **keywords) -> Tensor:
        y = self.fn(x, *args, **keywords)
        x = x.expand_as(y)  # latents that the whole batch shares meet what each element made of them
        return self.gru(y.flatten(0, 1), x.flatten(0, 1)).view_as(y)
