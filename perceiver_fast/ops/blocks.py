"""Differentiable forms of the ops that see all tokens, in blocks of tokens: plain PyTorch whose memory is bounded.

A block's logits exist only while it is computed, and again in its backward (ops/derivatives.py). Blocks of attention are
put together by their log-sum-exps, ``o = sum_k w_k o_k`` with ``w_k = exp(lse_k - lse)``; of inverted attention, whose
softmax is every token's own, they simply add up. Where one block is enough, the reference itself runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.float64 import lse_of
from perceiver_fast.ops.derivatives import recomputed
from perceiver_fast.reference.dropout import apply_dropout
from perceiver_fast.reference.grid_attention import grid_logits, grid_values
from perceiver_fast.reference.softmax import EMPTY_LSE, EPS, block_weights, inverted_lse

ELEMENTS = 2**20  # of the largest tensor of a block
LEAST = 256  # tokens of a block: shorter ones would leave more partial results than logits


def block_size(rows: int) -> int:
    """Tokens of a block whose every token has ``rows`` numbers."""
    return max(LEAST, ELEMENTS // max(rows, 1))


def _blocks(size: int, axis: int, *tensors: Tensor | None) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Start of every block along an axis, and its part of every tensor; their gradients come together in one piece."""
    count = -(-next(t for t in tensors if t is not None).shape[axis] // size)
    parts = [(None,) * count if t is None else t.split(size, axis) for t in tensors]
    for i, part in enumerate(zip(*parts)):
        yield i * size, part


def _shares(
    statistics: list[Tensor], counts: list[int], empty: Tensor | None, inverted: bool
) -> tuple[list[Tensor], Tensor]:
    """What every block's results are multiplied by, and lse, from the second results of ``block_weights``.

    Args:
        statistics: ``[.., N]`` of every block.
        counts: tokens of every block.
        empty: bool, broadcast over statistics: rows that are masked in all blocks, and attend uniformly. Or None.
        inverted: see ``block_weights``.
    """
    if inverted:
        total = sum(statistics[1:], statistics[0])
        return [total.clamp_min(EPS).reciprocal()] * len(statistics), inverted_lse(total)
    if empty is not None:
        statistics = [s.masked_fill(empty, math.log(count)) for s, count in zip(statistics, counts)]
    stacked = torch.stack(statistics)
    lse = stacked.logsumexp(0)
    if empty is not None:
        lse = lse.masked_fill(empty, EMPTY_LSE)
    return list(stacked.softmax(0).unbind(0)), lse


def _weighted(parts: list[Tensor], shares: list[Tensor]) -> Tensor:
    terms = [part * share.unsqueeze(-1).to(part.dtype) for part, share in zip(parts, shares)]
    return sum(terms[1:], terms[0])


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
    size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`perceiver_fast.reference.cross_attention` in blocks of ``size`` tokens. Default: :func:`block_size`."""
    rows, tokens = q.shape[:-1].numel(), k.shape[2]
    size = block_size(rows) if size is None else size
    if size >= tokens:

        def whole(q, k, v, mask, seed):
            return reference.cross_attention(q, k, v, mask, scale, dropout, seed, inverted)

        return recomputed(whole, rows * tokens, q, k, v, mask, seed)
    outs, statistics, counts = [], [], []
    masks = (None,) * -(-tokens // size) if mask is None else mask.split(size, 1)
    for (start, (k_part, v_part)), mask_part in zip(_blocks(size, 2, k, v), masks):

        def block(q, k, v, mask, seed, start=start):
            logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * scale
            weight, statistic = block_weights(logits, None if mask is None else mask[:, None, None, :], inverted)
            if dropout > 0:
                weight = apply_dropout(weight, seed, dropout, torch.arange(start, start + k.shape[2], device=k.device))
            return torch.einsum("bhnm,bhmd->bhnd", weight, v), statistic

        counts.append(k_part.shape[2])
        out, statistic = recomputed(block, rows * counts[-1], q, k_part, v_part, mask_part, seed)
        outs.append(out)
        statistics.append(statistic)
    empty = None if mask is None or inverted else ~mask.any(-1)[:, None, None]
    shares, lse = _shares(statistics, counts, empty, inverted)
    return _weighted(outs, shares), lse_of(lse)


def grid_attention(
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
    size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`perceiver_fast.reference.grid_attention` in blocks of about ``size`` tokens: slices of the longest axis."""
    sizes, features = tuple(scale.shape[1:]), feat.shape[-1]
    rows, tokens, heads = q.shape[:-1].numel(), math.prod(sizes), q.shape[0] // max(1, feat.shape[0])
    axis = sizes.index(max(sizes))
    slices = max(1, (block_size(rows) if size is None else size) * sizes[axis] // tokens)
    if slices >= sizes[axis]:

        def whole(q, feat, scale, mask, seed):
            return reference.grid_attention(q, feat, scale, mask, dropout, seed, inverted)

        return recomputed(whole, rows * tokens, q, feat, scale, mask, seed)
    begin = features + sum(sizes[:axis])  # of the axis' part of q
    end = begin + sizes[axis]
    others, alongs, statistics, keeps, counts = [], [], [], [], []
    for start, parts in _blocks(slices, 1 + axis, feat, scale, mask):
        length = parts[0].shape[1 + axis]

        def block(q, feat, scale, mask, seed, start=start, length=length):
            if heads > 1:
                feat, scale = _repeat(feat, heads), _repeat(scale, heads)
                mask = None if mask is None else _repeat(mask, heads)
            q = torch.cat([q[..., :begin], q[..., begin + start : begin + start + length], q[..., end:]], -1)
            logits = grid_logits(q, feat, scale).flatten(2)
            weight, statistic = block_weights(logits, None if mask is None else mask.flatten(1).unsqueeze(1), inverted)
            if dropout > 0:
                index = torch.arange(tokens, device=q.device).view(sizes).narrow(axis, start, length)
                weight = apply_dropout(weight, seed, dropout, index.flatten())
            parts = grid_values(weight, feat, scale)
            along = parts.pop(1 + axis)
            return torch.cat(parts, -1), along, statistic, weight.sum(-1)

        counts.append(length * (tokens // sizes[axis]))
        other, along, statistic, kept = recomputed(block, rows * counts[-1], q, *parts, seed)
        others.append(other)
        alongs.append(along)
        statistics.append(statistic)
        keeps.append(kept)
    empty = None
    if mask is not None and not inverted:
        empty = ~mask.flatten(1).any(-1, keepdim=True)
    shares, lse = _shares(statistics, counts, empty, inverted)
    other = _weighted(others, shares)
    along = torch.cat([part * share.unsqueeze(-1) for part, share in zip(alongs, shares)], -1)
    o = torch.cat([other[..., :begin], along, other[..., begin:]], -1)
    kept = _weighted([k.unsqueeze(-1) for k in keeps], shares).squeeze(-1)
    return o, lse_of(lse), kept


def grid_query_attention(
    tables: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    v: Tensor,
    mask: Tensor | None,
    grid: bool,
    dropout: float,
    seed: Tensor | None,
    sum_heads: bool,
    size: int | None = None,
) -> Tensor:
    """:func:`perceiver_fast.reference.grid_query_attention`'s output, in blocks of about ``size`` queries.

    A query's softmax is its own, so blocks are nothing but slices of the grid's longest axis.
    """
    sizes, rows, features = tuple(feat.shape[1:-1]), tables.shape[:3].numel(), feat.shape[-1]
    batch, heads, queries = *tables.shape[:2], math.prod(sizes)
    axis = sizes.index(max(sizes))
    slices = max(1, (block_size(rows) if size is None else size) * sizes[axis] // max(1, queries))
    if slices >= sizes[axis]:

        def whole(tables, feat, scale, bias, v, mask, seed):
            o, _ = reference.grid_query_attention(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads)
            return o

        return recomputed(whole, rows * queries, tables, feat, scale, bias, v, mask, seed)
    begin = features + sum(sizes[:axis])  # of the axis' part of the tables
    end = begin + sizes[axis]
    outs = []
    for start, parts in _blocks(slices, 1 + axis, feat, scale):
        length = parts[0].shape[1 + axis]

        def block(tables, feat, scale, bias, v, mask, seed, start=start, length=length):
            if grid:
                part = tables[..., begin + start : begin + start + length]
                tables = torch.cat([tables[..., :begin], part, tables[..., end:]], -1)
            index = torch.arange(queries, device=tables.device).view(sizes).narrow(axis, start, length).flatten()
            row = (torch.arange(batch * heads, device=tables.device)[:, None] * queries + index).flatten()
            o, _ = reference.grid_query_attention(
                tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, row
            )
            return o.unflatten(1, feat.shape[1:-1])

        outs.append(recomputed(block, rows * length * (queries // sizes[axis]), tables, *parts, bias, v, mask, seed))
    return torch.cat(outs, 1 + axis).flatten(1, len(sizes))


def _repeat(t: Tensor, heads: int) -> Tensor:
    """``[B, ..]`` to ``[B heads, ..]``."""
    return t.unsqueeze(1).expand(-1, heads, *[-1] * (t.dim() - 1)).flatten(0, 1)


def fourier_projection(
    feat: Tensor | None,
    coords: Tensor,
    frequencies: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float | None,
    size: int | None = None,
) -> Tensor:
    """:func:`perceiver_fast.reference.fourier_projection` in blocks of ``size`` tokens."""
    batch = max(coords.shape[0], 0 if feat is None else feat.shape[0])
    per_token = batch * max(weight.shape)
    size = block_size(per_token) if size is None else size

    def block(feat, coords, frequencies, weight, bias):
        return reference.fourier_projection(feat, coords, frequencies, weight, bias, eps, smooth=True)

    outs = [
        recomputed(block, per_token * at.shape[1], part, at, frequencies, weight, bias)
        for _, (part, at) in _blocks(size, 1, feat, coords)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
