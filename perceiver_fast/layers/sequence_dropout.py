"""Structured dropout: whole tokens are left out, and cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_tokens(tokens: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
    """Keep a random share ``1 - dropout`` of the tokens, at least one; masked tokens are left out first.

    Args:
        tokens: ``[B, M, C]``.
        mask: bool ``[B, M]``, or None.
        dropout: share of the tokens to drop.

    Returns:
        The tokens kept ``[B, K, C]``, in random order, and their mask ``[B, K]`` or None. Every batch element keeps the
        same share of its own unmasked tokens, rounded up.

    Source:
        perceiver-pytorch 0.11.0, with its random draws; Hawthorne et al., "General-purpose, long-context autoregressive
        modeling with Perceiver AR", 2022.
    """
    batch, count = tokens.shape[:2]
    order = torch.randn(batch, count, device=tokens.device)
    if mask is not None:
        order = order.masked_fill(~mask, -torch.finfo(order.dtype).max)
    share = 1.0 - dropout
    kept = order.topk(max(1, int(share * count)), dim=1).indices
    rows = torch.arange(batch, device=tokens.device).unsqueeze(1)
    if mask is not None:
        limit = torch.ceil(mask.sum(-1, keepdim=True) * share).int()
        mask = mask[rows, kept] & (torch.arange(kept.shape[1], device=tokens.device) < limit)
    return tokens[rows, kept], mask
