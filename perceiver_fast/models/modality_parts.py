"""The tokens of modalities, which may be read in chunks or shared out to several processes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from perceiver_fast.models.agreeing import agree
from perceiver_fast.models.inputs import like
from perceiver_fast.models.modality import Modality, ModalityInput, check_modality_inputs
from perceiver_fast.models.parts import alike_of, checked_chunk, dims_of, look_at_stream
from perceiver_fast.shards.agreement import Look, Place
from perceiver_fast.tokens import TokenGroups, Tokens, TokenStream
from perceiver_fast.tokens.describe import describe_grid, describe_points
from perceiver_fast.tokens.streams import Chunk, Stream


def describe_modality(
    modality: Modality, given: ModalityInput, embedding: Tensor, place: Place | None = None
) -> Tokens:
    """The tokens of one modality's data, with its embedding; ``place``: of its rows among all, where they are a part."""
    codes = modality.num_freq_bands, modality.max_freq
    if isinstance(given, Tensor):
        return describe_grid(given, *codes, embedding, place)
    return describe_points(*given, *codes, embedding)


def read_modalities(
    model: Any,
    data: Mapping[str, ModalityInput | Stream],
    mask: Mapping[str, Tensor | None] | None,
) -> TokenGroups:
    """The tokens of a sharded model's parts, or of streams, in one group a modality.

    Args:
        model: the model.
        data, mask: as its forward takes them.

    Raises:
        TypeError, ValueError, RuntimeError: as the forward and :func:`perceiver_fast.distributed.shard` raise them.
    """
    shard, who = model.shard, type(model).__name__
    named = {modality.name: modality for modality in model.modalities}

    def look() -> Look:
        given: Any = data
        masks: Any = mask
        if shard is not None and isinstance(data, Mapping):
            given = {name: _own(model, name, value) for name, value in data.items()}
            masks = None if mask is None else {n: shard.own(who, f"mask[{n!r}]", m) for n, m in mask.items()}
        masks = _checked(model, named, given, masks)
        present = [name for name in named if name in given]
        alike: dict[str, object] = {"modalities": tuple(present)}
        sizes = []
        for name in present:
            value = given[name]
            if isinstance(value, Stream):
                size, facts = look_at_stream(
                    _reader(model, named[name]), value, masks.get(name), None, like(model).device
                )
            else:
                tensor, coords = (value, None) if isinstance(value, Tensor) else value
                size, facts = tensor.shape[1], alike_of(tensor, coords)
            sizes.append(size)
            alike |= {f"{name}: {what}": fact for what, fact in facts.items()}
        return Look(sizes, alike, (given, masks, present, sizes))

    if shard is None:
        seen = look()
        found, places = seen.found, [Place(0, size) for size in seen.sizes]
    else:
        found, places = agree(model, look)
    given, masks, present, sizes = found
    groups: list[Any] = []
    firsts, before = [], 0
    for name, place, size in zip(present, places, sizes):
        embedding = model.embeddings(name)
        if shard is not None:
            (embedding,) = shard.local(embedding)
        value, modality = given[name], named[name]
        if isinstance(value, Stream):
            groups.append(_stream_of(model, modality, value, embedding, place, size))
            across = value.across(groups[-1].dims)
        else:
            groups.append(describe_modality(modality, value, embedding, place))
            across = prod(value.shape[2:-1]) if isinstance(value, Tensor) else 1
        firsts.append(before + place.start * across)
        before += place.total * across
    tokens = TokenGroups(groups, [masks.get(name) for name in present], firsts)
    tokens.shard = shard
    return tokens


def _own(model: Any, name: str, value: Any) -> Any:
    """This process' part of a modality's input, where it is a DTensor."""
    shard: Any = model.shard
    if isinstance(value, (tuple, list)):
        return tuple(shard.own(type(model).__name__, f"data[{name!r}]", t) for t in value)
    return shard.own(type(model).__name__, f"data[{name!r}]", value)


def _checked(model: Any, named: dict[str, Modality], given: Any, masks: Any) -> dict[str, Tensor | None]:
    """``check_inputs``, where a part may be of no rows, and a stream is checked chunk by chunk; the masks."""
    if not isinstance(given, Mapping):
        return model.check_inputs(given, masks)
    stand_ins, empty = dict(given), set()
    for name, value in given.items():
        modality = named.get(name)
        if modality is None:
            continue
        if isinstance(value, Stream):
            batch, sizes = value.batch(dims_of(_reader(model, modality), value)), (1,) * modality.input_axis
            stand_ins[name] = like(model).new_zeros(batch, *sizes, modality.input_channels)
            empty.add(name)  # look_at_stream checks it
            continue
        pair = isinstance(value, (tuple, list)) and len(value) == 2
        tensor, coords = value if pair else (value, None)
        if isinstance(tensor, Tensor) and tensor.dim() > 2 and tensor.shape[1] == 0:
            some = tensor.new_zeros(tensor.shape[0], 1, *tensor.shape[2:])
            stand_ins[name] = some if coords is None else (some, coords.new_zeros(1, coords.shape[-1]))
            empty.add(name)
    masks = {} if masks is None else dict(masks)
    found = model.check_inputs(stand_ins, {name: m for name, m in masks.items() if name not in empty})
    for name in empty:
        found[name] = masks.get(name) if isinstance(given[name], Stream) else None
    return found


def _reader(model: Any, modality: Modality) -> Any:
    """What models/parts.py asks of a model, for one modality of it."""

    def check_inputs(data: Tensor, mask: Tensor | None, coords: Tensor | None = None) -> Tensor | None:
        given: Any = data if coords is None else (data, coords)
        checked = check_modality_inputs(
            type(model).__name__, [modality], {modality.name: given}, {modality.name: mask}, like(model)
        )
        return checked[modality.name]

    return SimpleNamespace(input_axis=modality.input_axis, check_inputs=check_inputs)


def _stream_of(
    model: Any, modality: Modality, source: Stream, embedding: Tensor, place: Place, length: int
) -> TokenStream:
    reader, device = _reader(model, modality), like(model).device
    dims = dims_of(reader, source)

    def describe(chunk: Chunk, place: Place, embedding: Tensor) -> tuple[Tokens, Tensor | None]:
        chunk = checked_chunk(reader, chunk, device)
        given: Any = chunk.data if chunk.coords is None else (chunk.data, chunk.coords)
        at = Place(place.start + chunk.start, place.total)
        return describe_modality(modality, given, embedding, at), chunk.mask

    batch = source.batch(dims)
    return TokenStream(source, dims, describe, (embedding,), place, batch, model.input_dim, device, length)
