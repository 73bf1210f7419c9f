"""Attention among the tokens themselves, in time and memory proportional to their number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.layers.fusing import is_plain, is_watched
from perceiver_fast.ranges import layer_range
from perceiver_fast.shards.shard import ShardedAttention


class LinearAttention(ShardedAttention):
    """``v (softmax_d(q)^T softmax_M(k))`` for every head; the d x d matrix in brackets sums over all tokens.

    This is perceiver-pytorch's order of the factors, not that of the literature, where k meets v first.

    Args:
        dim: channels of the tokens, C.
        heads, dim_head: number of heads, and channels of a head, d. Default: 4 and 64.
        dropout: dropout of the result in training. Default: 0.

    Source:
        perceiver-pytorch 0.11.0; after Shen et al., "Efficient attention: attention with linear complexities", 2021.
    """

    def __init__(self, dim: int, *, heads: int = 4, dim_head: int = 64, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(dropout))

    @layer_range
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: tokens ``[B, M, C]``.
            mask: bool ``[B, M]`` or ``[B, ..]`` of M elements, True where a token counts; a row that is all False counts all
                tokens alike. Default: all count.

        Returns:
            ``[B, M, C]``.
        """
        if not is_watched(x) and is_plain(self.to_qkv, nn.Linear) and self.to_qkv.bias is None:
            weights, whole = self.to_qkv.weight.chunk(3), None  # q, k and v one after the other take less memory
        else:
            weights, whole = (), self.to_qkv(x).chunk(3, dim=-1)

        def part(index: int) -> Tensor:
            """q, k or v, ``[B, H, M, d]``."""
            projected = F.linear(x, weights[index]) if whole is None else whole[index]
            return projected.unflatten(-1, (self.heads, projected.shape[-1] // self.heads)).transpose(1, 2)

        q, k = (part(0) * self.scale).softmax(dim=-1), part(1)
        if mask is not None:
            # Before the softmax, so that a masked token has weight zero and the others' weights sum to one.
            # (perceiver-pytorch 0.11.0 masks after it, with the mask's meaning reversed, and nearly always raises an error.)
            k = k.masked_fill(~mask.flatten(1)[:, None, :, None], -torch.finfo(k.dtype).max)
        called = self.called()
        if called is None:
            summary = q.transpose(-1, -2) @ k.softmax(dim=-2)  # [B, H, d, d]
        else:
            summary = called.shard.summary(q, k)
        del q, k
        out = part(2) @ summary
        return self.to_out(out.transpose(1, 2).flatten(2))
