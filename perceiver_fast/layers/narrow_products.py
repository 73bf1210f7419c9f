"""Products of float32 matrices on tensor cores: factors rounded to bfloat16, sums and results in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NarrowProduct(torch.autograd.Function):
    """``x [B, N, K]`` times ``y [B, K, M]``; the gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        x, y = x.bfloat16(), y.bfloat16()
        if x.device.type == "cpu":  # it has no product of that kind; this one has the same sums
            return torch.bmm(x.float(), y.float())
        return torch.bmm(x, y, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return NarrowProduct.apply(d_out, y.mT), NarrowProduct.apply(x.mT, d_out)
