"""Decoding for queries that are described: their tensor is built only where the decoder's modules have to be called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perceiver_fast.layers.checks import check_real
from perceiver_fast.layers.decoding import FusedDecoder, plan_decoder, why_decoder_modules
from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.layers.observer import observer
from perceiver_fast.tokens import PointQueries, Queries

PART = 2**21  # numbers that describe queries (a scale each, and raw channels or codes), existing at a time in inference


def check_described(who: str, queries: Queries, batch: int, channels: int, like: Tensor) -> None:
    """Check described queries.

    Args:
        who: the model's name, for messages.
        queries: what to check.
        batch, channels: the expected B and D.
        like: a parameter of the model, whose dtype and device are expected of the queries' linear layer.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    if queries.channels != channels:
        raise ValueError(
            f"{who}: expected queries of {channels} channels (queries_dim={channels}), got {queries.channels}; change "
            "their frequencies or feat, or give them embed=nn.Linear(.., queries_dim)"
        )
    for name in ("feat", "coords"):
        given = getattr(queries, name, None)
        if given is not None and given.shape[0] not in (1, batch):
            raise ValueError(
                f"{who}: expected queries for a batch of {batch}, like data, got {name} {tuple(given.shape)}; leave out "
                "the batch if it is shared"
            )
    if queries.embed is not None:
        check_real(who, "the weight of the queries' embed", queries.embed.weight, like)


def decode_described(
    queries: Queries,
    latents: Tensor,
    attention: nn.Module,
    to_logits: nn.Module | None,
    after: Callable[[Tensor], Tensor],
    built: Callable[[Tensor], Tensor],
    rows: int,
) -> Tensor:
    """The output ``[B, Q, D]`` for described queries.

    Args:
        queries: the description.
        latents: what they attend to, ``[B, N, D]``.
        attention: the decoder's PreNorm.
        to_logits: the last layer, where nothing stands between it and the attention; else None.
        after: whatever follows the attention, ``to_logits`` included.
        built: decodes a tensor of queries ``[B, q, D]``.
        rows: queries that are decoded at once in inference, where they or what follows the attention is built.
    """
    batch = latents.shape[0]
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    last = to_logits if is_plain(to_logits, nn.Linear) else None
    looks, plan = observer(), None
    if (looks is None or not looks.needs_queries) and why_decoder_modules(attention, queries) is None:
        plan = plan_decoder(attention, last, latents, queries)
    if plan is None or plan.path == "built":

        def decode(part: Queries) -> Tensor:
            return built(part.tensor(latents).expand(batch, -1, -1))

        return decode(queries) if whole else torch.cat([decode(part) for part in queries.parts(rows)], 1)
    if looks is not None:
        shape = torch.Size((batch, queries.count, queries.channels))
        looks.begins(attention, shape, residual=False)
        looks.decodes(attention, shape, latents, plan)
    decoder = FusedDecoder(attention, last, latents, plan.taken.backend)
    done = last is not None or type(to_logits) is nn.Identity
    if whole:
        out = decoder.decode(queries.describe(latents))
        return out if done else after(out)
    if not done:
        return torch.cat([after(decoder.decode(part.describe(latents))) for part in queries.parts(rows)], 1)
    out, start = latents.new_empty(batch, queries.count, decoder.channels, dtype=decoder.dtype), 0
    numbers = queries.code_channels if isinstance(queries, PointQueries) or queries.feat is not None else 1
    for part in queries.parts(max(1, PART // numbers)):
        decoder.decode_into(out[:, start : start + part.count], part.describe(latents))
        start += part.count
    return out
