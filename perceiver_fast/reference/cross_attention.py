"""Attention over built keys and values, in plain PyTorch, with every option of perceiver-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast.float64 import lse_of
from perceiver_fast.reference.dropout import apply_dropout
from perceiver_fast.reference.softmax import attention_weights


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    inverted: bool = False,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T) v`` and the logarithm of the softmax's denominator.

    Args:
        q: ``[B, H, N, d]``.
        k: ``[B, H, M, d]``.
        v: ``[B, H, M, dv]``.
        mask: bool ``[B, M]``, True where a token may be attended to; a row that is all False attends uniformly.
        scale: of the logits. Default: 1 / sqrt(d).
        dropout: probability of dropping an attention weight.
        seed: int64 of one element or two, which weights are dropped; see :mod:`perceiver_fast.reference.dropout`.
        inverted: softmax over the queries, then normalised over the tokens (perceiver-pytorch's
            ``inverted_cross_attn``).

    Returns:
        o ``[B, H, N, dv]`` and lse ``[B, H, N]`` float64, -3.4e38 for a row that is all masked (inverted: of
        the sum over the tokens, see :func:`perceiver_fast.reference.softmax.inverted_lse`).
    """
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    weight, lse = attention_weights(logits, None if mask is None else mask[:, None, None, :], inverted)
    if dropout > 0:
        weight = apply_dropout(weight, seed, dropout)
    return torch.einsum("bhnm,bhmd->bhnd", weight, v), lse_of(lse)
