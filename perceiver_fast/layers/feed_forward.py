"""GEGLU feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_fast.layers.stream import Branch, is_called, is_plain
from perceiver_fast.ops.feed_forward import feed_forward
from perceiver_fast.ops.geglu import geglu
from perceiver_fast.ops.linear import product_dtype
from perceiver_fast.ranges import layer_range


class GEGLU(nn.Module):
    """``x * gelu(gate)`` of ``[x, gate]`` in the last dimension (Shazeer, "GLU variants improve transformer", 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(x)


class FeedForward(Branch):
    """``dim -> GEGLU(2 * mult * dim) -> dim``, then dropout."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Linear(dim * mult, dim), nn.Dropout(dropout)
        )

    @layer_range
    def forward(self, x: Tensor, bias_apart: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        if self._is_plain():
            wide, _, narrow, dropout = self.net
            x = x.to(product_dtype(x))
            out, bias = feed_forward(x, wide.weight, wide.bias, narrow.weight, self.cache), narrow.bias
            if not bias_apart or (dropout.training and dropout.p > 0):
                out, bias = dropout(out + bias.to(out.dtype)), None
        else:
            out, bias = self.net(x), None
        return (out, bias) if bias_apart else out

    def _is_plain(self) -> bool:
        """Whether one op on the parameters can stand in for calls of the layers within."""
        wide, gate, narrow, dropout = self.net
        if type(gate) is not GEGLU or is_called(self.net) or is_called(gate) or is_called(dropout):
            return False
        if not (is_plain(wide, nn.Linear) and is_plain(narrow, nn.Linear)):
            return False
        return wide.bias is not None and narrow.bias is not None
