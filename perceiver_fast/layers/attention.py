"""Multi-head attention's projections, and self-attention of the latents with them."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_fast.layers.stream import Branch, is_plain
from perceiver_fast.ops.linear import linear, product_dtype
from perceiver_fast.ops.sdpa import sdpa
from perceiver_fast.ranges import layer_range


class Attention(Branch):
    """Projections to_q, to_kv and to_out; called on its own, self-attention of ``[B, N, D]``.

    Args:
        query_dim: channels of queries and of the output.
        context_dim: channels of what is attended to. Default: query_dim.
        heads: number of heads.
        dim_head: channels of a head.
        dropout: dropout of attention weights in training.
    """

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        inner_dim = dim_head * heads
        self.heads = heads
        self.dim_head = dim_head
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(query_dim if context_dim is None else context_dim, inner_dim * 2, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner_dim, query_dim)

    @property
    def active_dropout(self) -> float:
        """Probability of dropping an attention weight in the current mode."""
        return self.dropout.p if self.dropout.training else 0.0

    def split_heads(self, x: Tensor) -> Tensor:
        """``[B, N, H d]`` to ``[B, H, N, d]``."""
        return x.unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)

    def project(self, name: str, x: Tensor) -> Tensor:
        """``to_q`` or ``to_kv`` of ``x [.., D]``."""
        layer = getattr(self, name)
        return linear(x, layer.weight, layer.bias, self.cache, name) if is_plain(layer, nn.Linear) else layer(x)

    def project_out(self, x: Tensor, bias_apart: bool) -> Tensor | tuple[Tensor, Tensor | None]:
        """``to_out`` of ``x [.., H d]``; with bias_apart, what it is before the bias, and the bias."""
        layer = self.to_out
        if not is_plain(layer, nn.Linear):
            return (layer(x), None) if bias_apart else layer(x)
        out = linear(x, layer.weight, None if bias_apart else layer.bias, self.cache, "to_out")
        return (out, layer.bias) if bias_apart else out

    @layer_range
    def forward(self, x: Tensor, bias_apart: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        x = x.to(product_dtype(x))
        q = self.split_heads(self.project("to_q", x))
        k, v = (self.split_heads(t) for t in self.project("to_kv", x).chunk(2, dim=-1))
        if x.shape[1] == 1:  # softmax over one latent is constant: its gradient is exactly zero, SDPA's only nearly
            q = q * 0
        out = sdpa(q, k, v, dropout=self.active_dropout)
        return self.project_out(out.transpose(1, 2).flatten(2), bias_apart)
