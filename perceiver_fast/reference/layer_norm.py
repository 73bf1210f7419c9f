"""LayerNorm of a residual stream, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``y = x + branch + branch_bias`` and ``z = LayerNorm(y)``.

    Args:
        x: ``[.., D]``.
        branch: ``[.., D]`` or None.
        branch_bias: ``[D]`` or None.
        weight, bias: LayerNorm's, ``[D]``.
        eps: LayerNorm's epsilon.
        out_dtype: dtype of z.

    Returns:
        y ``[.., D]`` in the dtype of x, z ``[.., D]`` in out_dtype.
    """
    if branch is not None:
        if branch_bias is not None:
            branch = branch + branch_bias
        x = (x + branch).to(x.dtype)
    z = torch.nn.functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return x, z.to(out_dtype)
