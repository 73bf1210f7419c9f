"""A GRU cell in place of a residual connection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers.fusing import fusable
from perceiver_fast.layers.pre_norm import PreNorm, keywords_for
from perceiver_fast.ranges import layer_range


@fusable
class GRUGating(nn.Module):
    """``GRU(fn(x, ..), x)``: a GRU cell, whose state is the latents, takes in the layer's output.

    Args:
        dim: channels of the latents, D.
        fn: layer from ``[B, N, D]`` to ``[B, N, D]``.

    Source:
        perceiver-pytorch 0.11.0; after Parisotto et al., "Stabilizing transformers for reinforcement learning", 2020.
    """

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.dim = dim
        self.fn = fn
        self.gru = nn.GRUCell(dim, dim)

    @layer_range
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Latents ``[B, N, D]`` (``[1, N, D]`` if the whole batch shares them) to ``[B, N, D]``.

        Args:
            x: the latents.
            **kwargs: what ``fn`` takes beside them.
        """
        y = self.fn(x, **keywords_for(self.fn, PreNorm, kwargs))
        out = self.gru(y.flatten(0, -2), x.flatten(0, -2))
        return out.view_as(y) if y.dim() == 3 else out.unflatten(0, (x.shape[0], -1))
