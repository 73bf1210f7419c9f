"""Grid attention in plain PyTorch. It builds the N x M logits, which the kernels never do."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast.float64 import lse_of
from perceiver_fast.reference.dropout import apply_dropout
from perceiver_fast.reference.softmax import attention_weights


def grid_logits(q: Tensor, feat: Tensor, scale: Tensor) -> Tensor:
    """Logits ``S[b, n, m] = scale_m (q_feat[n] . feat_m + sum_a q_axes_a[n, i_a(m)])``.

    Args:
        q: ``[B, N, L]``, L = F + sum(sizes): the part that meets the raw channels, then one part for every axis.
        feat: ``[B, *sizes, F]``.
        scale: ``[B, *sizes]``.

    Returns:
        ``[B, N, *sizes]``, the dtype of the inputs.
    """
    sizes, features = feat.shape[1:-1], feat.shape[-1]
    q_feat, *q_axes = q.split([features, *sizes], dim=-1)
    axes = 0.0
    for axis, q_axis in enumerate(q_axes):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        axes = axes + q_axis.reshape(*q.shape[:2], *shape)  # [B, N, 1, n_a, 1]
    # Scaled first: the products of a token of 1e38 overflow, and its scale is zero.
    return torch.einsum("bnf,b...f->bn...", q_feat, feat * scale.unsqueeze(-1)) + axes * scale.unsqueeze(1)


def grid_attention(
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    inverted: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``o[b, n] = sum_m P[n, m] scale_m [feat_m, onehot(i_1(m)), .., onehot(i_A(m))]``, P the softmax of the logits.

    Args:
        q, feat, scale: see :func:`grid_logits`. With inverted, q may have a multiple of feat's batch size: its heads.
        mask: bool ``[B, *sizes]``, True where a token may be attended to. A row that is all False attends
            uniformly to all tokens, as perceiver-pytorch does.
        dropout, seed: probability of dropping a weight, and which; see :mod:`perceiver_fast.reference.dropout`.
        inverted: softmax over the queries, then normalised over the tokens.

    Returns:
        o ``[B, N, L]`` in the dtype of the inputs, lse ``[B, N]`` float64, the log-sum-exp of the logits
        (-3.4e38 for a row that is all masked; inverted: of the sum over the tokens, see :func:`perceiver_fast.reference.softmax.inverted_lse`), and the
        sums of the weights P ``[B, N]``.
    """
    heads = q.shape[0] // max(1, feat.shape[0])
    if heads > 1:
        feat, scale = (t.repeat_interleave(heads, 0) for t in (feat, scale))
        mask = None if mask is None else mask.repeat_interleave(heads, 0)
    logits = grid_logits(q, feat, scale)
    weight, lse = attention_weights(logits.flatten(2), None if mask is None else mask.flatten(1).unsqueeze(1), inverted)
    if dropout > 0:
        weight = apply_dropout(weight, seed, dropout)
    return torch.cat(grid_values(weight, feat, scale), -1), lse_of(lse), weight.sum(-1)


def grid_values(weight: Tensor, feat: Tensor, scale: Tensor) -> list[Tensor]:
    """``sum_m weight[b, n, m] scale_m [feat_m, onehot(i_1(m)), .., onehot(i_A(m))]``, part by part.

    Args:
        weight: ``[B, N, M]``.
        feat, scale: see :func:`grid_logits`.

    Returns:
        ``[B, N, F]``, then ``[B, N, n_a]`` of every axis.
    """
    axes = range(scale.dim() - 1)
    weight = weight.unflatten(2, scale.shape[1:])
    parts = [torch.einsum("bn...,b...f->bnf", weight, feat * scale.unsqueeze(-1))]
    weight = weight * scale.unsqueeze(1)
    for axis in axes:
        others = [2 + a for a in axes if a != axis]
        parts.append(weight.sum(others) if others else weight)
    return parts
