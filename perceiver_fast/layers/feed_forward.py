"""GEGLU feed-forward."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.layers.fusing import fusable, is_watched, why_not
from perceiver_fast.layers.residual_stream import with_bias
from perceiver_fast.ops.feed_forward import feed_forward
from perceiver_fast.ops.geglu import geglu
from perceiver_fast.ops.linear import product_dtype
from perceiver_fast.ranges import layer_range


@fusable
class GEGLU(nn.Module):
    """``value * gelu(gate)``, where ``[value, gate]`` are the halves of the last dimension.

    Source:
        perceiver-pytorch 0.11.0; Shazeer, "GLU variants improve transformer", 2020.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[.., 2 F]`` to ``[.., F]``."""
        if not is_watched(x):
            return geglu(x)
        x, gate = x.chunk(2, dim=-1)
        return x * F.gelu(gate)


@fusable
class FeedForward(nn.Module):
    """``dim -> GEGLU(2 * mult * dim) -> dim``, then dropout.

    Args:
        dim: channels of what comes in and goes out, D.
        mult: width of the layer between over D. Default: 4.
        dropout: dropout of the result in training. Default: 0.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.layers import FeedForward
        >>> FeedForward(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, dim * mult * 2), GEGLU(), nn.Linear(dim * mult, dim), nn.Dropout(dropout)
        )

    @layer_range
    def forward(self, x: Tensor) -> Tensor:
        """``[.., D]`` to ``[.., D]``."""
        if is_watched(x) or self.why_modules() is not None:
            return self.net(x)
        out, bias = self._fused(x)
        return with_bias(out, bias)

    def why_modules(self) -> str | None:
        """Why the layers inside have to be called, in words; None if one op may stand in for them."""
        net: Any = self._modules["net"]
        found = why_not("net", net, nn.Sequential)
        if found is not None:
            return found
        layers = list(net._modules.values())
        if len(layers) not in (3, 4):
            return f"net has {len(layers)} layers"
        found = (
            why_not("net.0", layers[0], nn.Linear)
            or why_not("net.1", layers[1], GEGLU)
            or why_not("net.2", layers[2], nn.Linear)
            or (why_not("net.3", layers[3], nn.Dropout) if len(layers) == 4 else None)
        )
        if found is None and (layers[0]._parameters["bias"] is None or layers[2]._parameters["bias"] is None):
            return "net has a linear layer without bias"
        return found

    @property
    def active_dropout(self) -> float:
        """The share of the result that is dropped; zero outside training. Only where :meth:`why_modules` is None."""
        net: Any = self._modules["net"]
        _, _, _, *dropout = net._modules.values()
        return dropout[0].p if dropout and dropout[0].training else 0.0

    def projections(self) -> tuple[Any, ...]:
        """Weight and bias of both linear layers. Only where :meth:`why_modules` is None."""
        net: Any = self._modules["net"]
        first, _, second, *_ = net._modules.values()
        wide, narrow = first._parameters, second._parameters
        return wide["weight"], wide["bias"], narrow["weight"], narrow["bias"]

    @layer_range
    def branch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The feed-forward in the place of a call, only where :meth:`why_modules` is None.

        Args:
            x: ``[.., D]``.

        Returns:
            ``[.., D]`` without the last bias, and that bias ``[D]``; with active dropout, the result and None.
        """
        return self._fused(x)

    def _fused(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`branch`, which profilers show as a range of its own."""
        net: Any = self._modules["net"]
        first, _, second, *_ = net._modules.values()
        x = x.to(product_dtype(x))
        wide, narrow = first._parameters, second._parameters
        out, bias = feed_forward(x, wide["weight"], wide["bias"], narrow["weight"]), narrow["bias"]
        if (dropout := self.active_dropout) > 0:
            return F.dropout(with_bias(out, bias), dropout), None
        return out, bias
