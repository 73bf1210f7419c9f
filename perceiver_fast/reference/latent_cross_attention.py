"""Pre-normalised cross-attention of latents to keys and values that are given, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.reference.cross_attention import cross_attention
from perceiver_fast.reference.layer_norm import smooth_layer_norm


def latent_cross_attention(
    x: Tensor,
    keys_values: Tensor,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    adds: bool = True,
) -> Tensor:
    """``[B, N, D]``; the arguments are :func:`perceiver_fast.ops.latent_cross_attention.latent_cross_attention`'s."""
    norm_weight, norm_bias, to_q, to_out, to_out_bias = parameters
    q = F.linear(smooth_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), to_q)
    q = q.expand(keys_values.shape[0], -1, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, *keys_values.chunk(2, -1)))
    o = cross_attention(q, k, v, mask, logit_scale, dropout, seed)[0].transpose(1, 2).flatten(2)
    out = F.linear(o, to_out, to_out_bias)
    return x + out if adds else out
