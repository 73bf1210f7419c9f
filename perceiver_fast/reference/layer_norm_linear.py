"""LayerNorm and the linear layer after it, in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.reference.layer_norm import smooth_layer_norm


def layer_norm_linear(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``LayerNorm(x [.., C]) weight^T``, ``[.., D]``; see :func:`perceiver_fast.ops.layer_norm_linear.layer_norm_linear`."""
    return F.linear(smooth_layer_norm(x, x.shape[-1:], gain, shift, eps), weight)
