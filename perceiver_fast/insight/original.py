"""What perceiver-pytorch computes for a layer, in its own order, for its work to be counted beside ours.

Its Perceiver builds every token, projects all of them to keys and values, and forms the N x M weights. These functions
call the same operators on tensors of the same shapes. Their results mean nothing: parameters have sizes and no values.
"""

from __future__ import annotations

from math import pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.insight.recording import Row
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.layers import Attention, FeedForward
from perceiver_fast.ops.work import Work
from perceiver_fast.tokens import EmbeddedGrid, EmbeddedPoints, GridTokens, PointTokens, Tokens


def norm(x: Tensor) -> Tensor:
    """LayerNorm of ``x [.., D]``."""
    return F.layer_norm(x, x.shape[-1:], x.new_empty(x.shape[-1]), x.new_empty(x.shape[-1]))


def linear(x: Tensor, channels: int, bias: bool = False) -> Tensor:
    """``x [.., D]`` to ``[.., channels]``."""
    return F.linear(x, x.new_empty(channels, x.shape[-1]), x.new_empty(channels) if bias else None)


def attention(
    fn: Attention,
    x: Tensor,
    context: Tensor | None = None,
    mask: Tensor | None = None,
    inverted: bool = False,
    ends: bool = True,
) -> Tensor:
    """PreNorm(Attention) of ``x [B, N, D]`` to ``context [B, M, C]`` with its mask ``[B, M]``, or among ``x``.

    Args:
        fn: what says how many heads there are, of how many channels, and what else may differ.
        inverted: softmax over ``x``, then normalised over the context.
        ends: with the norm and projection of ``x`` and that of the result, which groups of tokens share.
    """
    heads, inner = fn.heads, fn.heads * fn.dim_head
    z = norm(x) if ends else x
    tokens = z if context is None else norm(context)
    q = linear(z, inner) if ends else z.new_empty(*z.shape[:2], inner)
    if fn.queries_contribute_kv and context is not None:
        tokens = torch.cat([z, tokens], dim=1)
        mask = None if mask is None else torch.cat([mask.new_ones(z.shape[:2]), mask], dim=-1)
    keys, values = linear(tokens, 2 * inner).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2).flatten(0, 1) for t in (q, keys, values))
    logits = torch.einsum("bid,bjd->bij", q, k) * fn.dim_head**-0.5
    if mask is not None:
        mask = mask.unsqueeze(1).expand(-1, heads, -1).reshape(-1, 1, mask.shape[-1])
        logits.masked_fill_(~mask, -torch.finfo(logits.dtype).max)
    weights = logits.softmax(dim=-2 if inverted else -1)
    if inverted:
        weights = weights if mask is None else weights.masked_fill(~mask, 0.0)
        weights = F.normalize(weights, p=1, dim=-1)
    out = torch.einsum("bij,bjd->bid", F.dropout(weights, fn.active_dropout), v)
    out = out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
    return linear(out, x.shape[-1], bias=True) if ends else out


def wide_channels(layer: FeedForward) -> int | None:
    """Channels after GEGLU; None where the layer after it has been replaced by one that does not say."""
    return getattr(layer.net[2], "in_features", None)


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """PreNorm(FeedForward) of ``x [B, N, D]``."""
    net: Any = layer.net
    value, gates = linear(norm(x), 2 * net[2].in_features, bias=True).chunk(2, dim=-1)
    dropout = net[3].p if len(net) > 3 and net[3].training else 0.0
    return F.dropout(linear(value * F.gelu(gates), x.shape[-1], bias=True), dropout)


def encode(data: Tensor, positions: Tensor, bands: int) -> Tensor:
    """``data [B, .., F]`` with the codes of its positions ``[.., A]``: sines and cosines of ``bands`` frequencies."""
    x = positions.unsqueeze(-1)
    angle = x * torch.linspace(1.0, 2.0, bands, device=x.device, dtype=x.dtype) * pi
    code = torch.cat([torch.cat([angle.sin(), angle.cos()], dim=-1), x], dim=-1).flatten(-2)
    return torch.cat([data, code.expand(*data.shape[:-1], -1)], dim=-1)


def count_layer(row: Row, like: Tensor) -> Work:
    """What perceiver-pytorch counts for a layer that was recorded.

    Call it where the recorded model can run: in the mode of its tensors.

    Args:
        row: of a :class:`perceiver_fast.insight.recording.Recorder`.
        like: a parameter of the model: its dtype and device are computed in.
    """
    layer, has_norm = row.inner, row.inner is not row.module
    with WorkCounter() as counter:
        if row.attended:
            _cross_attention(row, like)
        elif has_norm and (isinstance(layer, Attention) or (isinstance(layer, FeedForward) and wide_channels(layer))):
            shape: Any  # layers with a norm say it
            for shape, residual in row.calls:
                x = like.new_empty(shape)
                out = attention(layer, x) if isinstance(layer, Attention) else feed_forward(layer, x)
                if residual:
                    x + out  # for it to be counted
        else:
            return total(row.operators)  # the same as ours
    return total(counter.operators)


def _cross_attention(row: Row, like: Tensor) -> None:
    """What a row's latents do with its group of tokens, or with all of them."""
    layer: Any = row.inner
    for seen in row.attended:
        batch, _, channels = seen.parts[0].shape
        for group, (tokens, given) in enumerate(zip(seen.groups, seen.masks)):
            if row.group in (None, group):
                x = like.new_empty(batch, seen.count, channels).expand(tokens.batch, -1, -1)
                context = like.new_empty(tokens.batch, tokens.count, tokens.channels)
                mask = None if given is None else x.new_empty(context.shape[:2], dtype=torch.bool)
                out = attention(layer, x, context, mask, seen.inverted, ends=row.last)
                if row.calls[0].residual and row.last:
                    x + out  # for it to be counted


def count_tokens(described: list[tuple[Tokens, bool]], own: Work) -> Work:
    """What perceiver-pytorch counts for building tokens; ``own`` is what led to their description.

    Args:
        described: of a :class:`perceiver_fast.insight.recording.Recorder`.
        own: where tokens are not encoded, both do the same.
    """
    with WorkCounter() as counter:
        for given, grouped in described:
            tokens = given.inner if isinstance(given, (EmbeddedGrid, EmbeddedPoints)) else given
            if isinstance(tokens, PointTokens):
                built = encode(tokens.feat, tokens.coords.to(tokens.feat.dtype), tokens.frequencies.shape[1])
            elif isinstance(tokens, GridTokens):
                # A group has its embedding in front, on an axis of one index: to perceiver-pytorch more raw channels.
                codes = [axis.code for axis in (tokens.codes[1:] if grouped else tokens.codes)]
                width = sum(code.shape[-1] for code in codes)
                like = tokens.feat.new_empty(0, dtype=tokens.dtype)
                axes = [torch.linspace(-1.0, 1.0, len(code), device=like.device, dtype=like.dtype) for code in codes]
                positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
                data = like.new_empty(tokens.batch, *positions.shape[:-1], tokens.channels - width)
                built = encode(data, positions, width // len(codes) // 2)
            else:
                return own
            if isinstance(given, (EmbeddedGrid, EmbeddedPoints)):
                linear(built, given.channels, given.bias is not None)
    return total(counter.operators)
