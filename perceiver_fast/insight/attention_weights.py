"""Attention weights of chosen rows of one attention layer, formed from what it was called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.insight.observe import Attended
from perceiver_fast.layers import Attention
from perceiver_fast.layers.cross_attention import FusedCrossAttention, why_cross_attention_modules
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.ops.library import compute_dtype, unless_autocast
from perceiver_fast.tokens import DenseTokens, GridTokens, PointTokens, Tokens

PIECE = 16384  # tokens whose keys exist at once


def weights_shape(seen: Attended) -> tuple[int, int, int]:
    """Batch size, heads, and the number of tokens that weights are over."""
    fn = _projections(seen.layer)
    batch = seen.groups[0].batch if seen.groups else seen.z.shape[0]
    own = seen.count if _attends_itself(seen) else 0
    return batch, fn.heads, own + sum(group.count for group in seen.groups)


def attention_weights(seen: Attended, rows: Sequence[int]) -> Tensor:
    """Attention weights of some of the N rows of ``seen.z``, ``[B, H, rows, M]``, M the tokens of all groups joined.

    Nothing larger exists but the keys of PIECE tokens and, for inverted attention, their logits of all rows.
    """
    rows = list(rows)
    z = seen.z if seen.inverted else seen.z[:, rows]
    batch, heads, total = weights_shape(seen)
    out = torch.empty(batch, heads, len(rows), total, dtype=compute_dtype(z.dtype), device=z.device)
    done = 0
    for logits, mask in _pieces(seen, z):
        masked = None if mask is None else ~mask[:, None, None]
        if masked is not None:
            logits = logits.masked_fill(masked, -torch.finfo(logits.dtype).max)
        if seen.inverted:
            logits = logits.softmax(2)[:, :, rows]
            logits = logits if masked is None else logits.masked_fill(masked, 0.0)
        out[..., done : done + logits.shape[-1]] = logits
        done += logits.shape[-1]
    # As the layers normalise: a row that is all masked is uniform, and of inverted attention zero.
    return F.normalize(out, p=1, dim=-1, eps=1e-8) if seen.inverted else out.softmax(-1)


def _projections(layer: nn.Module) -> Attention:
    return layer.fn if is_cross_attention(layer) else layer


def _attends_itself(seen: Attended) -> bool:
    """Whether what attends is among what is attended to: then it comes first, and is never masked."""
    return not seen.groups or seen.layer.fn.queries_contribute_kv


def _pieces(seen: Attended, z: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits ``[B, H, n, m]`` of ``z [B, n, D]`` and masks ``[B, m]`` of all that is attended to, m tokens at a time."""
    fn = _projections(seen.layer)
    q = fn.split_heads(fn.project("to_q", z)).to(compute_dtype(z.dtype)) * fn.scale

    def logits(keys: Tensor) -> Tensor:
        with unless_autocast(z.device):
            return q @ fn.split_heads(keys).to(q.dtype).mT

    if _attends_itself(seen):
        for part in seen.z.split(PIECE, 1):
            yield logits(fn.project("to_kv", part).chunk(2, -1)[0]), None
    plain = bool(seen.groups) and why_cross_attention_modules(seen.layer) is None
    for group, mask in zip(seen.groups, seen.masks):
        pieces = [slice(start, start + PIECE) for start in range(0, group.count, PIECE)]
        if plain and isinstance(group, GridTokens):
            found = _grid_logits(seen.layer, z, group, pieces)
        else:
            found = (logits(_keys(seen.layer, group, piece, plain)) for piece in pieces)
        for piece, of_piece in zip(pieces, found):
            yield of_piece, None if mask is None else mask[:, piece]


def _keys(layer: nn.Module, tokens: Tokens, piece: slice, plain: bool) -> Tensor:
    """Keys of a piece of tokens, ``[B, m, H d]``; where layers are more than their parameters they are called."""
    if not plain:
        return layer.fn.to_kv(layer.norm_context(tokens.tensor()[:, piece])).chunk(2, -1)[0]
    if isinstance(tokens, PointTokens):
        tokens = PointTokens(tokens.feat[:, piece], tokens.coords[:, piece], tokens.frequencies)
    else:
        tokens = DenseTokens(tokens.feat[:, piece])
    weight = layer.fn.to_kv.weight
    to_k = SimpleNamespace(weight=weight[: weight.shape[0] // 2])  # values are not needed
    return tokens.keys_values(to_k, layer.norm_context)


def _grid_logits(layer: nn.Module, z: Tensor, tokens: GridTokens, pieces: Sequence[slice]) -> Iterator[Tensor]:
    """Logits over pieces of a grid, whose keys are not formed."""
    q, constant, *_ = FusedCrossAttention(layer).grid_tables(z, tokens)
    q_feat, *q_axes = q.split([tokens.features, *tokens.sizes], -1)
    feat = tokens.feat.flatten(1, -2).unsqueeze(1)
    scale = tokens.scale(layer.norm_context.eps).flatten(1)[:, None, None]
    for piece in pieces:
        indices = torch.arange(*piece.indices(tokens.count), device=z.device)
        with unless_autocast(z.device):
            sums = q_feat @ feat[:, :, piece].mT
        for q_axis, index in zip(q_axes, torch.unravel_index(indices, tokens.sizes)):
            sums += q_axis[..., index]
        yield sums * scale[..., piece] + constant.unsqueeze(-1)
