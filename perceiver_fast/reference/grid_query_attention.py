"""Attention of described queries to few keys in plain PyTorch. It builds the M x N logits, which the kernels never do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_fast.float64 import lse_of
from perceiver_fast.reference.dropout import apply_dropout
from perceiver_fast.reference.softmax import attention_weights


def grid_query_logits(
    tables: Tensor, feat: Tensor, scale: Tensor | None, bias: Tensor | None, grid: bool = True
) -> Tensor:
    """Logits ``S[b, h, m, n] = r_m (tables[n, :F] . x_m + sum_a tables_a[n, i_a(m)]) + bias[n]``.

    Args:
        tables: ``[B, H, N, L]``: the part that meets the raw channels, then one part for every axis.
        feat: x, ``[B or 1, *sizes, F]``; F may be zero.
        scale: r, ``[B or 1, *sizes]``; None is one.
        bias: ``[B, H, N]``; None is zero.
        grid: L = F + sum(sizes). False: queries are points, feat ``[B or 1, M, F]``, and L = F.

    Returns:
        ``[B, H, M, N]``, the dtype of the inputs.
    """
    sizes, features = feat.shape[1:-1], feat.shape[-1]
    table_feat, *table_axes = tables.split([features, *(sizes if grid else ())], -1)
    # Scaled first: the products of a query of 1e38 overflow, and its scale is zero.
    x = feat if scale is None else feat * scale.unsqueeze(-1)
    logits = x.flatten(1, -2).unsqueeze(1) @ table_feat.mT
    axes: Any = 0.0  # a tensor, where there are axes
    for axis, table in enumerate(table_axes):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        axes = axes + table.mT.reshape(*tables.shape[:2], *shape, tables.shape[2])  # [B, H, 1, n_a, 1, N]
    if grid:
        axes = axes.flatten(2, -2)
        logits = logits + (axes if scale is None else axes * scale.flatten(1)[:, None, :, None])
    return logits if bias is None else logits + bias.unsqueeze(2)


def grid_query_attention(
    tables: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    mask: Tensor | None = None,
    grid: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    sum_heads: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``o[b, m, h] = sum_n P[b, h, m, n] v[b, h, n]``, P the softmax of the logits over the keys.

    Args:
        tables, feat, scale, bias, grid: see :func:`grid_query_logits`.
        v: ``[B, H, N, C]``.
        mask: bool ``[B, N]``, True where a key may be attended to. A batch element that is all False attends uniformly.
        dropout, seed, rows: probability of dropping a weight, and which; see :mod:`perceiver_fast.reference.dropout`.
        sum_heads: add the heads' outputs up.

    Returns:
        o ``[B, M, H, C]``, or ``[B, M, C]`` with sum_heads, in the dtype of the inputs, and lse ``[B, H, M]`` float64, the
        log-sum-exp of the logits (-3.4e38 where all keys are masked).
    """
    logits = grid_query_logits(tables, feat, scale, bias, grid)
    weight, lse = attention_weights(logits, None if mask is None else mask[:, None, None, :], False)
    if dropout > 0:
        weight = apply_dropout(weight, seed, dropout, rows=rows)
    return torch.einsum("bhmn,bhnc->bmc" if sum_heads else "bhmn,bhnc->bmhc", weight, v), lse_of(lse)
