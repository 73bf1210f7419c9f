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
    smooth: bool = False,
) -> tuple[Tensor, Tensor]:
    """``y = x + branch + branch_bias`` and ``z = LayerNorm(y)``.

    Args:
        x: ``[.., D]``.
        branch: ``[.., D]`` or None.
        branch_bias: ``[D]`` or None.
        weight, bias: LayerNorm's, ``[D]``.
        eps: LayerNorm's epsilon.
        out_dtype: dtype of z.
        smooth: use :func:`smooth_layer_norm`, whose derivatives of every order are right. Default: False.

    Returns:
        y ``[.., D]`` in the dtype of x, z ``[.., D]`` in out_dtype.
    """
    if branch is not None:
        if branch_bias is not None:
            branch = branch + branch_bias
        x = (x + branch).to(x.dtype)
    norm = smooth_layer_norm if smooth else torch.nn.functional.layer_norm
    z = norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    return x, z.to(out_dtype)


def smooth_layer_norm(
    x: Tensor, shape: torch.Size, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """:func:`torch.nn.functional.layer_norm` over the last dimension, by operators with right derivatives of every order.

    torch's own (2.13) is silently wrong from the third derivative on: its second derivative treats mean and variance as
    constants.

    Args:
        x: ``[.., D]``.
        shape: ``(D,)``.
        weight, bias: ``[D]`` or None.
        eps: added to the variance. Default: 1e-5.

    Returns:
        ``[.., D]``, the dtype of x; computed in float32 at least.
    """
    y = x if x.dtype == torch.float64 else x.float()
    y = y - y.mean(-1, keepdim=True)
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)
