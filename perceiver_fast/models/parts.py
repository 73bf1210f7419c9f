"""Inputs that a model does not have as one tensor: read in chunks, or shared out to several processes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from perceiver_fast.models.agreeing import agree
from perceiver_fast.models.inputs import like
from perceiver_fast.shards.agreement import Look, Place
from perceiver_fast.tokens import Description, Tokens, TokenStream
from perceiver_fast.tokens.streams import Chunk, Stream


def read_parts(
    model: Any,
    data: Any,
    mask: Tensor | None,
    coords: Tensor | None = None,
    also: Callable[[int], dict[str, object]] = lambda batch: {},
) -> tuple[Tokens | TokenStream, Tensor | None]:
    """The tokens of a sharded model's part, or of a stream, and their mask.

    Args:
        model: has ``shard``, ``input_axis``, ``check_inputs`` and ``describe``, as :class:`GridPerceiver` has.
        data, mask, coords: as its forward takes them.
        also: checks other inputs for a batch, and says what has to be the same of them everywhere. Default: there are none.

    Raises:
        TypeError, ValueError, RuntimeError: as the forward and :func:`perceiver_fast.distributed.shard` raise them.
    """
    shard, who = model.shard, type(model).__name__

    def look() -> Look:
        own, own_mask, own_coords = data, mask, coords
        if shard is not None:
            named = ("data", data), ("mask", mask), ("coords", coords)
            own, own_mask, own_coords = (shard.own(who, what, t) for what, t in named)
        if isinstance(own, Stream):
            size, alike = look_at_stream(model, own, own_mask, own_coords, like(model).device)
        else:
            own_mask = check_part(model, own, own_mask, own_coords)
            size = own.sizes[0] if isinstance(own, Description) else own.shape[1]
            alike = alike_of(own, own_coords)
        batch: Any = alike["batch"]
        return Look([size], alike | also(batch), ((own, own_mask, own_coords), size))

    if shard is None:
        seen = look()
        found, place = seen.found, Place(0, seen.sizes[0])
    else:
        found, (place,) = agree(model, look)
    (own, own_mask, own_coords), size = found
    tokens: Tokens | TokenStream
    if isinstance(own, Stream):
        tokens = stream_of(model, own, place, size)
        across = own.across(tokens.dims)
    else:
        describe: Any = model.describe
        tokens = describe(own, own_coords, place)
        across = prod(own.sizes[1:]) if isinstance(own, Description) else prod(own.shape[2:-1])
    tokens.first, tokens.total = place.start * across, place.total * across
    tokens.shard = shard
    return tokens, own_mask


def alike_of(own: Any, coords: Tensor | None) -> dict[str, object]:
    """What has to be the same of all parts of one input: all but the size of its first axis."""
    if isinstance(own, Description):
        learns = [p.requires_grad for p in own.embed.parameters()] if own.embed is not None else []
        tensors = own.feat, getattr(own, "coords", None)
        return {
            "kind": type(own).__name__, "batch": own.batch, "channels": own.channels, "codes": own.code_channels,
            "other axes": own.sizes[1:], "learning parameters of embed": learns, "gradients of inputs": _learn(*tensors),
        }  # fmt: skip
    inner = () if coords is not None else tuple(own.shape[2:-1])
    return {
        "kind": "positions" if coords is not None else "rows", "batch": own.shape[0], "channels": own.shape[-1],
        "dtype": own.dtype, "other axes": inner, "gradients of inputs": _learn(own, coords),
    }  # fmt: skip


def _learn(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted of any: where one process' latents depend on its input, all have to."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_part(model: Any, own: Any, mask: Tensor | None, coords: Tensor | None) -> Tensor | None:
    """``model.check_inputs``, for a part that may be of no rows; the mask."""
    if isinstance(own, Description) and own.count == 0:
        return None
    takes_none = getattr(model, "takes_empty_parts", True)
    if not takes_none or not isinstance(own, Tensor) or own.dim() < 3 or own.shape[1] > 0:
        return model.check_inputs(own, mask, coords) if coords is not None else model.check_inputs(own, mask)
    row = own.new_zeros(own.shape[0], 1, *own.shape[2:])
    if coords is None:
        model.check_inputs(row, None)
    else:
        model.check_inputs(row, None, coords.new_zeros(1, coords.shape[-1]))
    return None


def look_at_stream(
    model: Any, source: Stream, mask: Tensor | None, coords: Tensor | None, device: torch.device
) -> tuple[int, dict[str, object]]:
    """Rows of a stream, and what has to be the same of all processes' streams; checks what can be checked before reading."""
    if mask is not None or coords is not None:
        raise ValueError(
            f"{type(model).__name__}: expected mask and coords of streamed data as arguments of pf.stream, which reads them "
            "with the data, got them here"
        )
    dims = dims_of(model, source)
    size = source.length(dims)
    source.check_lengths(dims, size)
    first = source.first(dims)
    if first is not None:
        checked_chunk(model, first, device)
    inner = source.shape_of()[-dims + 2 : -1] if not source.points else ()
    kind = "a stream of positions" if source.points else "a stream"
    return size, {"kind": kind, "batch": source.batch(dims), "other axes": tuple(inner)}


def dims_of(model: Any, source: Stream) -> int:
    """Dimensions of a chunk, with batch and channels."""
    return 3 if source.points else model.input_axis + 2


def checked_chunk(model: Any, chunk: Chunk, device: torch.device) -> Chunk:
    """A chunk on ``device``, where the model is, after the model's own checks."""
    data, mask = chunk.data.to(device), None if chunk.mask is None else chunk.mask.to(device)
    if chunk.coords is None:
        return Chunk(data, None, model.check_inputs(data, mask), chunk.start)
    coords = chunk.coords.to(device)
    return Chunk(data, coords, model.check_inputs(data, mask, coords), chunk.start)


def stream_of(model: Any, source: Stream, place: Place, length: int) -> TokenStream:
    """The tokens of a stream, every chunk of which the model describes when it is read."""
    dims, device = dims_of(model, source), like(model).device

    def describe(chunk: Chunk, place: Place) -> tuple[Tokens, Tensor | None]:
        chunk = checked_chunk(model, chunk, device)
        tokens = model.describe(chunk.data, chunk.coords, Place(place.start + chunk.start, place.total))
        return tokens, chunk.mask

    batch = source.batch(dims)
    return TokenStream(source, dims, describe, (), place, batch, model.input_dim, device, length)


def kept_tokens(batch: int, start: int, size: int, total: int, dropout: float, device: torch.device) -> Tensor:
    """Which of this process' tokens layers/sequence_dropout.py would keep, if one process had all: bool ``[B, M]``.

    All processes draw the same numbers, for all tokens.
    """
    order = torch.randn(batch, total, device=device)
    left = order.topk(max(1, int((1.0 - dropout) * total)), dim=1).indices
    keep = torch.zeros_like(order, dtype=torch.bool).scatter_(1, left, True)
    return keep[:, start : start + size]
