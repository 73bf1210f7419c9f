"""GEGLU in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(h: Tensor, bias: Tensor | None) -> Tensor:
    """``value * gelu(gate)`` of ``[value, gate] = h + bias``.

    Args:
        h: ``[.., 2 F]``.
        bias: ``[2 F]`` or None.

    Returns:
        ``[.., F]``, the dtype of h.
    """
    dtype = h.dtype
    if bias is not None:
        h = h + bias
    value, gate = h.chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(dtype)
