"""Pre-normalised cross-attention of latents to the tokens of a grid, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.reference.cross_attention import cross_attention
from perceiver_fast.reference.grid_attention import grid_attention
from perceiver_fast.reference.layer_norm import smooth_layer_norm


def grid_cross_attention(
    x: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    codes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``[B, N, D]``; the arguments are :func:`perceiver_fast.ops.grid_cross_attention.grid_cross_attention`'s."""
    norm_weight, norm_bias, to_q, context_weight, context_bias, to_kv, to_out, to_out_bias = parameters
    weight = to_kv * context_weight
    weight = weight - weight.mean(1, keepdim=True)
    raw, *axes = weight.split(
        [weight.shape[1] - sum(code.shape[1] for code in codes), *(code.shape[1] for code in codes)], 1
    )
    table = [axis @ code.T for axis, code in zip(axes, codes)]
    if feat.shape[-1] > raw.shape[1]:  # raw channels less their mean, and the mean
        raw = torch.cat([raw, -torch.cat(axes, 1).sum(1, keepdim=True)], 1)
    keys, values = torch.cat([raw, *table], 1).unflatten(0, (2, heads, -1))  # [H, d, L]
    bias = (to_kv @ context_bias).chunk(2)[1]
    q = F.linear(smooth_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), to_q)
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2) @ (keys * logit_scale)  # [B, H, N, L]
    q = q.flatten(1, 2).expand(feat.shape[0], -1, -1)
    if scale is None:  # tokens of no axis, which are normalised
        (o,) = cross_attention(q.unsqueeze(1), feat.unsqueeze(1), feat.unsqueeze(1), mask, 1.0)[0].unbind(1)
    else:
        o, _, kept = grid_attention(q, feat, scale, mask, dropout, seed)
    o = o.unflatten(1, (heads, -1))
    made = (o @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
    if dropout > 0:  # the bias counts as often as the weights sum to
        made = made + torch.einsum(
            "bhn,hd->bnhd", kept.unflatten(1, (heads, -1)), bias.unflatten(0, (heads, -1))
        ).flatten(2)
    else:
        made = made + bias
    return x + F.linear(made, to_out, to_out_bias)
