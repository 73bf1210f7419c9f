"""A decoder's cross-attention whose queries are described, for attention given by its parts; see layers/decoding.py."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.attention import Parts, eager_work, normalized, project, split_heads
from perceiver_fast.layers.decoding import FusedDecoder, folds
from perceiver_fast.ops.grid_query_attention import (
    GRID_QUERY_ATTENTION,
    GridQueryAttentionCall,
    grid_query_attention_work,
)
from perceiver_fast.ops.library import compute_dtype, unless_autocast
from perceiver_fast.ops.work import Work, attention_work
from perceiver_fast.tokens import GridTokens


class DescribedDecoder(FusedDecoder):
    """Attention of the tokens of a grid to latents, and the linear layer after it.

    Args:
        parts: the attention; ``norm`` and ``to_q`` are plain.
        dense: the plain linear layer that follows.
        latents: what is attended to, ``[B, N, D]``.
        tokens: what asks.
    """

    def __init__(self, parts: Parts, dense: nn.Linear, latents: Tensor, tokens: GridTokens):
        fn: Any = SimpleNamespace(  # stands in for an Attention: nothing else of one is read
            _modules={"to_q": parts.to_q, "to_out": dense},
            heads=parts.heads,
            scale=parts.scale,
            active_dropout=parts.dropout,
        )
        self.fn, self.norm, self.backend, self.tokens = fn, parts.norm, "cpu", tokens
        context = normalized(parts.norm_context, latents)
        k, v = (split_heads(project(layer, context), parts.heads) for layer in parts.to_kv)
        self._prepare(latents, k, v, None)
        with unless_autocast(latents.device):
            self.arguments = self._arguments(tokens)

    def rows(self, start: int, stop: int) -> Tensor:
        """:meth:`decode` of the indices start to stop of the grid's first axis, ``[B, queries, O]``."""
        arguments, sizes = dict(self.arguments), self.tokens.sizes
        elements = arguments["tables"].shape[-1] - sum(sizes)
        feat, first, others = arguments["tables"].split([elements, sizes[0], sum(sizes[1:])], -1)
        arguments["tables"] = torch.cat([feat, first[..., start:stop], others], -1)
        arguments["feat"] = arguments["feat"][:, start:stop]
        if arguments["scale"] is not None:
            arguments["scale"] = arguments["scale"][:, start:stop]
        return self._attended(arguments)

    def all_rows(self) -> Tensor:
        """The attention's result for the whole grid, ``[B, M, O]``."""
        return self.rows(0, self.tokens.sizes[0])


def plan_described(
    parts: Parts, dense: nn.Linear, latents: Tensor, tokens: object
) -> tuple[str | None, tuple[Work, Work] | None]:
    """Why queries have to be built, or None; and the work as the class has it and by their description.

    Args:
        parts: the attention.
        dense: the linear layer that follows, plain.
        latents: what is attended to.
        tokens: a description of what asks.
    """
    if type(tokens) is not GridTokens:
        return "the queries are no grid", None
    call = GridQueryAttentionCall(compute_dtype(latents.dtype), latents.device, len(tokens.sizes))
    if GRID_QUERY_ATTENTION.choose(call).backend != "cpu":
        return "no kernel takes described queries here", None
    batch, keys, heads = latents.shape[0], latents.shape[1], parts.heads
    qk, values, out = len(parts.to_q.weight), len(parts.to_kv[1].weight), len(dense.weight)
    dim, dim_value, count, elements = qk // heads, values // heads, tokens.count, tokens.elements
    channels = out if folds(keys, dim_value, out) else dim_value
    length = elements + sum(tokens.sizes)
    shape = (batch, heads, keys, length), (1, *tokens.sizes, elements), (batch, heads, keys, channels)
    after = 0 if channels == out else batch * count * values * out
    described = grid_query_attention_work(*shape, True) + Work(batch * heads * keys * dim * length + after)
    q, k = (batch, heads, count, dim), (batch, heads, keys, dim)
    own = batch * count * (tokens.channels * qk + values * out)
    built = attention_work(q, k, (*k[:3], dim_value)) + Work(own)
    if built.cost < described.cost:
        return "built queries are less work", None
    return None, (eager_work(q, k, dim_value, own), described)


def grid_steps(tokens: GridTokens, most: int) -> list[tuple[int, int, int, int]]:
    """Parts of at most so many tokens: from and to an index of the first axis, and from and to a token."""
    inner = prod(tokens.sizes[1:])
    step = max(1, most // inner)
    found = []
    for start in range(0, tokens.sizes[0], step):
        stop = min(tokens.sizes[0], start + step)
        found.append((start, stop, start * inner, stop * inner))
    return found
