"""Attention over the outputs of all earlier blocks, in place of a plain residual connection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_fast.ops.library import autocast_dtype
from perceiver_fast.ranges import layer_range


class EnformerAttentionResidual(nn.Module):
    """A mean of the outputs of all earlier blocks, weighted by a softmax over the blocks, channel by channel.

    Args:
        dim: channels of the latents.
        rank: rank of the map that gives the logits.

    Source:
        perceiver-pytorch 0.11.0; attention residuals after arXiv:2603.15031, pooling after Avsec et al., Enformer, 2021.
    """

    def __init__(self, dim: int, *, rank: int = 64):
        super().__init__()
        self.to_attn_logits = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False)
        )

    @layer_range
    def forward(self, block_outputs: Sequence[Tensor]) -> Tensor:
        """The weighted mean ``[B, N, D]``.

        Args:
            block_outputs: at least one ``[B, N, D]``.
        """
        past = torch.stack(list(block_outputs), dim=2)  # [B, N, blocks, D]
        out = (past * self.to_attn_logits(past).softmax(dim=-2)).sum(-2)
        narrow = None if out.dtype == torch.float64 else autocast_dtype(out.device)
        return out.to(narrow or out.dtype)  # the dtype that perceiver-pytorch's einsum has under autocast
