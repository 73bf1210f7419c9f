"""Grid attention in plain PyTorch. Builds the N x M logits: simple, and the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def grid_logits(q: Tensor, feat: Tensor, scale: Tensor) -> Tensor:
    """Logits ``S[b, n, m] = scale_m (q_feat[n] . feat_m + sum_a q_axes_a[n, i_a(m)])``.

    Args:
        q: ``[B, N, L]``, the features' part then every axis' part, L = F + sum(sizes).
        feat: ``[B, *sizes, F]``.
        scale: ``[B, *sizes]``.

    Returns:
        ``[B, N, *sizes]``, the dtype of the inputs.
    """
    sizes, features = feat.shape[1:-1], feat.shape[-1]
    q_feat, *q_axes = q.split([features, *sizes], dim=-1)
    logits = torch.einsum("bnf,b...f->bn...", q_feat, feat)
    for axis, q_axis in enumerate(q_axes):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        logits = logits + q_axis.reshape(*q.shape[:2], *shape)  # [B, N, 1, n_a, 1]
    return logits * scale.unsqueeze(1)


def grid_attention(q: Tensor, feat: Tensor, scale: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``o[b, n] = sum_m softmax_m(S)[n, m] scale_m [feat_m, onehot(i_1(m)), .., onehot(i_A(m))]``.

    Args:
        q, feat, scale: see :func:`grid_logits`.
        mask: bool ``[B, *sizes]``, True where a token may be attended to. A row that is all False attends
            uniformly to all tokens, as perceiver-pytorch does.

    Returns:
        o ``[B, N, L]`` in the dtype of the inputs, and lse ``[B, N]`` float64, the log-sum-exp of the logits
        (-finfo.max of the dtype for a row that is all masked).
    """
    sizes = feat.shape[1:-1]
    logits = grid_logits(q, feat, scale)
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), -torch.finfo(logits.dtype).max)
    flat = logits.flatten(2)
    lse = flat.logsumexp(-1)
    weight = flat.softmax(-1).view(logits.shape) * scale.unsqueeze(1)  # P r
    parts = [torch.einsum("bn...,b...f->bnf", weight, feat)]
    for axis in range(len(sizes)):
        others = [2 + a for a in range(len(sizes)) if a != axis]
        parts.append(weight.sum(others) if others else weight)
    return torch.cat(parts, -1), lse.double()
