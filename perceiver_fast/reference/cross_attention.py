"""Attention over built keys and values, in plain PyTorch, with every option of perceiver-pytorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, inverted: bool = False
) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``.

    Args:
        q: ``[B, H, N, d]``.
        k: ``[B, H, M, d]``.
        v: ``[B, H, M, dv]``.
        mask: bool ``[B, M]``, True where a token may be attended to; a row that is all False attends uniformly.
        dropout: probability of dropping an attention weight.
        inverted: softmax over the queries, then normalised over the tokens (perceiver-pytorch's
            ``inverted_cross_attn``).

    Returns:
        ``[B, H, N, dv]``.
    """
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        mask = mask[:, None, None, :]
        logits = logits.masked_fill(~mask, -torch.finfo(logits.dtype).max)
    if inverted:
        weight = logits.softmax(dim=-2)
        if mask is not None:
            weight = weight.masked_fill(~mask, 0.0)
        weight = F.normalize(weight, p=1, dim=-1, eps=1e-8)
    else:
        weight = logits.softmax(dim=-1)
    weight = F.dropout(weight, dropout)
    return torch.einsum("bhnm,bhmd->bhnd", weight, v)
