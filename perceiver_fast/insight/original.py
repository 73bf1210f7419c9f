"""What perceiver-pytorch computes for a layer, in its own order, for its work to be counted beside ours.

Its Perceiver builds every token, projects all of them to keys and values, and forms the N x M weights. These functions
call the same operators on tensors of the same shapes. Their results mean nothing: parameters have sizes and no values.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.insight.recording import Attended, Row
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.layers import Attention, FeedForward, PreNorm
from perceiver_fast.ops.work import Work
from perceiver_fast.tokens import GridTokens, PointTokens, Tokens


@dataclass(frozen=True)
class Heads:
    """An attention: number of heads, channels of a head, dropout of the weights, and the ways it may differ."""

    heads: int
    dim_head: int
    dropout: float = 0.0
    inverted: bool = False
    queries_contribute_kv: bool = False
    ends: bool = True  # the queries' projection and that of the result, which groups of tokens share


def norm(x: Tensor) -> Tensor:
    """LayerNorm of ``x [.., D]``."""
    return F.layer_norm(x, x.shape[-1:], x.new_empty(x.shape[-1]), x.new_empty(x.shape[-1]))


def linear(x: Tensor, channels: int, bias: bool = False) -> Tensor:
    """``x [.., D]`` to ``[.., channels]``."""
    return F.linear(x, x.new_empty(channels, x.shape[-1]), x.new_empty(channels) if bias else None)


def attend(x: Tensor, context: Tensor, mask: Tensor | None, how: Heads) -> Tensor:
    """Of normalised ``x [B, N, D]`` to normalised ``context [B, M, C]`` with its mask ``[B, M]``; projections, too."""
    inner = how.heads * how.dim_head
    q = linear(x, inner) if how.ends else x.new_empty(*x.shape[:2], inner)
    if how.queries_contribute_kv:
        context = torch.cat([x, context], dim=1)
        mask = None if mask is None else torch.cat([mask.new_ones(x.shape[:2]), mask], dim=-1)
    keys, values = linear(context, 2 * inner).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (how.heads, -1)).transpose(1, 2).flatten(0, 1) for t in (q, keys, values))
    logits = torch.einsum("bid,bjd->bij", q, k) * how.dim_head**-0.5
    if mask is not None:
        mask = mask.unsqueeze(1).expand(-1, how.heads, -1).reshape(-1, 1, mask.shape[-1])
        logits.masked_fill_(~mask, -torch.finfo(logits.dtype).max)
    weights = logits.softmax(dim=-2 if how.inverted else -1)
    if how.inverted:
        weights = weights if mask is None else weights.masked_fill(~mask, 0.0)
        weights = F.normalize(weights, p=1, dim=-1)
    out = torch.einsum("bij,bjd->bid", F.dropout(weights, how.dropout), v)
    out = out.unflatten(0, (-1, how.heads)).transpose(1, 2).flatten(2)
    return linear(out, x.shape[-1], bias=True) if how.ends else out


def self_attention(x: Tensor, how: Heads) -> Tensor:
    """PreNorm(Attention) of ``x [B, N, D]``."""
    z = norm(x)
    return attend(z, z, None, how)


def cross_attention(x: Tensor, context: Tensor, mask: Tensor | None, how: Heads) -> Tensor:
    """PreNorm(Attention) of ``x [B, N, D]`` and ``context [B, M, C]``."""
    return attend(norm(x) if how.ends else x, norm(context), mask, how)


def feed_forward(x: Tensor, wide: int, dropout: float) -> Tensor:
    """PreNorm(FeedForward) of ``x [B, N, D]``, with ``wide`` channels after GEGLU."""
    value, gates = linear(norm(x), 2 * wide, bias=True).chunk(2, dim=-1)
    return F.dropout(linear(value * F.gelu(gates), x.shape[-1], bias=True), dropout)


def encode(positions: Tensor, bands: int) -> Tensor:
    """``[.., A]`` to ``[.., A (2 bands + 1)]``: sines and cosines of ``bands`` frequencies, and the position."""
    x = positions.unsqueeze(-1)
    angle = x * torch.linspace(1.0, 2.0, bands, device=x.device, dtype=x.dtype) * pi
    return torch.cat([torch.cat([angle.sin(), angle.cos()], dim=-1), x], dim=-1).flatten(-2)


def grid_tokens(data: Tensor, bands: int) -> Tensor:
    """``data [B, *sizes, F]`` to ``[B, M, C]``, with the code of its place in every token."""
    axes = [torch.linspace(-1.0, 1.0, size, device=data.device, dtype=data.dtype) for size in data.shape[1:-1]]
    code = encode(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1), bands)
    return torch.cat([data, code.expand(*data.shape[:-1], -1)], dim=-1).flatten(1, -2)


def point_tokens(data: Tensor, coords: Tensor, bands: int) -> Tensor:
    """``data [B, M, F]`` at ``coords [B or 1, M, A]`` to ``[B, M, C]``."""
    code = encode(coords.to(data.dtype), bands)
    return torch.cat([data, code.expand(data.shape[0], -1, -1)], dim=-1)


def wide_channels(layer: FeedForward) -> int | None:
    """Channels after GEGLU; None where the layer after it has been replaced by one that does not say."""
    return getattr(layer.net[2], "in_features", None)


def count_layer(row: Row, like: Tensor) -> Work:
    """What perceiver-pytorch counts for a layer that was recorded.

    Call it where the recorded model can run: in the mode of its tensors.

    Args:
        row: of a :class:`perceiver_fast.insight.recording.Recorder`.
        like: a parameter of the model: its dtype and device are computed in.
    """
    inner = row.module.fn if isinstance(row.module, PreNorm) else row.module
    with WorkCounter() as counter:
        if row.attended:
            for attended in row.attended:
                _count_cross_attention(row, attended, like)
        elif inner is not row.module and isinstance(inner, Attention):
            how = Heads(inner.heads, inner.dim_head, inner.active_dropout)
            for call in row.calls:
                x = like.new_empty(call.shape)
                _join(x, self_attention(x, how), call.residual)
        elif inner is not row.module and isinstance(inner, FeedForward) and wide_channels(inner):
            drops = len(inner.net) > 3 and inner.net[3].training
            dropout = inner.net[3].p if drops else 0.0
            for call in row.calls:
                x = like.new_empty(call.shape)
                _join(x, feed_forward(x, wide_channels(inner), dropout), call.residual)
        else:
            return total(row.operators)  # the same as ours
    return total(counter.operators)


def _join(x: Tensor, out: Tensor, residual: bool) -> Tensor:
    return x + out if residual else out


def _count_cross_attention(row: Row, attended: Attended, like: Tensor) -> None:
    layer, tokens = row.module, attended.tokens
    x = like.new_empty(attended.shape).expand(tokens.batch, -1, -1)
    context = like.new_empty(tokens.batch, tokens.count, tokens.channels)
    mask = x.new_empty(context.shape[:2], dtype=torch.bool) if attended.masked else None
    fn = layer.fn
    how = Heads(fn.heads, fn.dim_head, fn.active_dropout, attended.inverted, fn.queries_contribute_kv, row.last)
    _join(x, cross_attention(x, context, mask, how), row.calls[0].residual and row.last)


def count_tokens(described: list[tuple[Tokens, bool]], own: Work) -> Work:
    """What perceiver-pytorch counts for building tokens; ``own`` is what led to their description.

    Args:
        described: of a :class:`perceiver_fast.insight.recording.Recorder`.
        own: where tokens are not encoded, both do the same.
    """
    with WorkCounter() as counter:
        for tokens, grouped in described:
            if isinstance(tokens, PointTokens):
                point_tokens(tokens.feat, tokens.coords, tokens.frequencies.shape[1])
            elif isinstance(tokens, GridTokens):
                # A group has its embedding in front, on an axis of one index: to perceiver-pytorch more raw channels.
                codes = tokens.codes[1:] if grouped else tokens.codes
                code = sum(axis.code.shape[-1] for axis in codes)
                sizes = [len(axis.code) for axis in codes]
                data = tokens.feat.new_empty(tokens.batch, *sizes, tokens.channels - code, dtype=tokens.dtype)
                grid_tokens(data, code // len(codes) // 2)
            else:
                return own
    return total(counter.operators)
