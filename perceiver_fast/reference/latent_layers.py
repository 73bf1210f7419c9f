"""Latents through pre-normalised layers, self-attention and feed-forward, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.reference.cross_attention import cross_attention
from perceiver_fast.reference.geglu import geglu
from perceiver_fast.reference.layer_norm import smooth_layer_norm


def latent_layers(
    x: Tensor,
    parameters: Sequence[Tensor],
    heads: Sequence[int],
    scales: Sequence[float],
    eps: Sequence[float],
    dropouts: Sequence[float] = (),
    drawn: Sequence[Tensor] = (),
) -> Tensor:
    """``x [B, N, D]`` to ``[B, N, D]``; the arguments are :func:`perceiver_fast.ops.latent_layers.latent_layers`'s."""
    for i, (count, scale, epsilon) in enumerate(zip(heads, scales, eps)):
        norm_weight, norm_bias, first, second, last, last_bias = parameters[6 * i : 6 * i + 6]
        dropout = dropouts[i] if dropouts else 0.0
        seed = drawn[i] if dropout > 0 else None
        z = smooth_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon)
        if count > 0:
            k, v = F.linear(z, second).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (count, -1)).transpose(1, 2) for t in (F.linear(z, first), k, v))
            made = cross_attention(q, k, v, scale=scale, dropout=dropout, seed=seed)[0].transpose(1, 2).flatten(2)
        else:
            made = geglu(F.linear(z, first), second)
        branch = F.linear(made, last, last_bias)
        x = x + (branch * drawn[i] if dropout > 0 and count == 0 else branch)
    return x
