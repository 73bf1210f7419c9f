"""Structured dropout: whole tokens are left out, and cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_tokens(tokens: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor | None]:
    """Leave out a random share of the tokens, masked tokens first.

    Args:
        tokens: ``[B, M, C]``.
        mask: bool ``[B, M]``, or None.
        dropout: share of the tokens to drop.

    Returns:
        The tokens that are left ``[B, K, C]``, in random order, K at least 1, and their mask ``[B, K]`` or None. Of the
        unmasked tokens of every batch element the same share is left, rounded up.

    Source:
        perceiver-pytorch 0.11.0, with its random draws; Hawthorne et al., "General-purpose, long-context autoregressive
        modeling with Perceiver AR", 2022.
    """
    batch, count = tokens.shape[:2]
    order = torch.randn(batch, count, device=tokens.device)
    if mask is not None:
        order = order.masked_fill(~mask, -torch.finfo(order.dtype).max)
    share = 1.0 - dropout
    left = order.topk(max(1, int(share * count)), dim=1).indices
    rows = torch.arange(batch, device=tokens.device).unsqueeze(1)
    if mask is not None:
        limit = torch.ceil(mask.sum(-1, keepdim=True) * share).int()
        mask = mask[rows, left] & (torch.arange(left.shape[1], device=tokens.device) < limit)
    return tokens[rows, left], mask
