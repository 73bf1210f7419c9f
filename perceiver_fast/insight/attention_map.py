"""Where chosen latents look: attention weights of a layer, for those latents only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.insight.observe import Attended, LayerObserver, is_attention, layers_of
from perceiver_fast.insight.whole import check_whole
from perceiver_fast.layers.cross_attention import FusedCrossAttention, why_cross_attention_modules
from perceiver_fast.layers.observer import observing
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.models import MultimodalPerceiver
from perceiver_fast.models.modality import ModalityInput
from perceiver_fast.ops.library import compute_dtype, unless_autocast
from perceiver_fast.tokens import Description, GridTokens, TokenGroups, Tokens

WEIGHTS = 2**24  # that exist at once where many latents are looked at
PIECE = 16384  # tokens whose keys exist at once


@overload
def attention_map(
    model: nn.Module,
    data: Tensor | Description,
    layer: int | str = 0,
    latents: Iterable[int] | None = None,
    mask: Tensor | None = None,
    *,
    heads: str | None = None,
    **inputs: Any,
) -> Tensor: ...


@overload
def attention_map(
    model: MultimodalPerceiver,
    data: Mapping[str, ModalityInput],
    layer: int = 0,
    latents: Iterable[int] | None = None,
    mask: Mapping[str, Tensor | None] | None = None,
    *,
    heads: str | None = None,
    **inputs: Any,
) -> dict[str, Tensor]: ...


@overload
def attention_map(
    model: nn.Module,
    data: Any,
    layer: int | str = 0,
    latents: Iterable[int] | None = None,
    mask: Any = None,
    *,
    heads: str | None = None,
    **inputs: Any,
) -> Tensor | dict[str, Tensor]: ...


@torch.no_grad()
def attention_map(
    model: nn.Module,
    data: Any,
    layer: int | str = 0,
    latents: Iterable[int] | None = None,
    mask: Any = None,
    *,
    heads: str | None = None,
    **inputs: Any,
) -> Tensor | dict[str, Tensor] | dict[int, Tensor]:
    """Attention of chosen latents of one layer over what it attends to.

    The model runs up to that layer on its ordinary path; weights are formed for the chosen latents alone, so memory is
    a few times that of the result, never N x M.

    Args:
        model: any model of this package, or one that holds its layers; evaluated as in inference, whatever its mode.
        data, mask, **inputs: as its forward takes them, such as ``coords=``, ``queries=`` or ``context=``.
        layer: index among the cross-attentions in the order they run; or a layer's name as :func:`explain` prints it,
            which may be the latents' self-attention or a decoder's cross-attention. Default: 0.
        latents: indices of what attends: latents, or a decoder's queries. Default: the first 8.
        heads: ``"mean"`` averages over them. Default: None, each by itself.

    Returns:
        ``[B, H, len(latents), n_1, .., n_A]`` where the layer attends to the tokens of the input, ``[.., M]`` where it
        attends to other ones (latents; with queries_contribute_kv to N latents and then the tokens); without H for
        ``heads="mean"``. At least float32; each map sums to one, and is what the layer takes means of values with (inverted
        attention: after its normalisation over the tokens).

        A dict from names of modalities to such maps, which sum to one together, where the layer attends to several
        modalities: a :class:`MultimodalPerceiver`'s cross-attentions do, its latents' self-attention does not, and what a
        hook has called with the joined tokens does not. (Of groups of tokens without names: from their indices.)

    Raises:
        TypeError: the model has no attention layer of this package.
        IndexError: there is no such latent, or no cross-attention of this index ran.
        ValueError: there is no layer of this name, or it did not run on this input; or another value of heads.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> pf.attention_map(model, torch.randn(1, 6, 5, 3), latents=[0, 2]).shape
        torch.Size([1, 1, 2, 6, 5])
        >>> positions = torch.rand(1, 30, 2) * 2 - 1
        >>> pf.attention_map(model, torch.randn(1, 30, 3), heads="mean", coords=positions).shape
        torch.Size([1, 4, 30])
        >>> pf.attention_map(model, torch.randn(1, 6, 5, 3), "layers.0.self_attns.0.0.fn").shape
        torch.Size([1, 8, 4, 4])
    """
    who = "attention_map"
    if heads not in (None, "mean"):
        raise ValueError(f"{who}: expected heads to be 'mean' or None, got {heads!r}")
    chosen = None if latents is None else [int(latent) for latent in latents]
    if chosen is not None and (not chosen or min(chosen) < 0):
        raise IndexError(f"{who}: expected indices of latents from 0 on, at least one, got {chosen}")
    seen = _observe(who, model, data, layer, max(chosen or [0]), mask, inputs)
    chosen = list(range(min(8, seen.count))) if chosen is None else chosen
    if bad := [latent for latent in chosen if latent >= seen.count]:
        raise IndexError(f"{who}: expected latents in 0..{seen.count - 1}, got {bad}")
    maps = _weights(seen, chosen)
    maps = maps.mean(1) if heads == "mean" else maps
    if not seen.grouped:
        return _unflatten(maps, data) if seen.groups else maps
    parts = maps.split([group.count for group in seen.groups], -1)
    names = _modalities(model, data)
    if not names:
        return dict(enumerate(parts))
    return {name: _unflatten(part, data[name]) for name, part in zip(names, parts)}


@torch.no_grad()
def contrasting_latents(
    model: nn.Module,
    data: Any,
    layer: int | str = 0,
    count: int = 6,
    mask: Any = None,
    *,
    candidates: int | None = None,
    **inputs: Any,
) -> list[int]:
    """The latents whose attention varies most over what they attend to: those worth a look.

    Args:
        model, data, layer, mask, **inputs: see :func:`attention_map`.
        count: how many latents to choose. Default: 6.
        candidates: look at the first so many alone. Default: all.

    Returns:
        Indices, that of the highest variance first: of the weights over uniform ones, averaged over the heads; averaged
        over the batch.

    Raises:
        As :func:`attention_map`; and ValueError: a count or candidates below 1.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> len(pf.contrasting_latents(model, torch.randn(1, 6, 5, 3), count=2))
        2
    """
    who = "contrasting_latents"
    for name, value in (("count", count), ("candidates", candidates)):
        if value is not None and value < 1:
            raise ValueError(f"{who}: expected {name} to be at least 1, got {value}")
    seen = _observe(who, model, data, layer, None if candidates is None else candidates - 1, mask, inputs)
    rows = min(seen.count, candidates or seen.count)
    at_once = max(1, WEIGHTS // max(1, prod(_weights_shape(seen))))
    found = []
    for start in range(0, rows, at_once):
        weights = _weights(seen, [*range(start, min(start + at_once, rows))])
        relative = weights.mean(1) * weights.shape[-1]
        found.append(relative.var(-1, correction=0).mean(0))
    return torch.cat(found).argsort(descending=True, stable=True)[:count].tolist()


class _Stop(Exception):
    """Everything needed was seen."""


class _Look(LayerObserver):
    """Keeps what one layer attends with, and stops the forward after it.

    Args:
        layers: names and layers of the model.
        wanted: index among the cross-attentions in the order they run, or a name.
        last: the last row of ``z`` that is needed, as decoders are called for parts of their queries. Default: all.
    """

    def __init__(self, layers: Mapping[str, nn.Module], wanted: int | str, last: int | None):
        super().__init__(layers.items())
        self.wanted, self.last = wanted, last
        self.ran: list[str] = []  # cross-attentions
        self.seen: Attended | None = None

    def attends(self, layer, z, tokens=None, mask=None, inverted=False, fused=True) -> None:
        if not self.knows(layer):
            return
        name = self.next_name(layer)
        if tokens is not None and name not in self.ran:
            self.ran.append(name)
            if self.wanted == len(self.ran) - 1:
                self.wanted = name
        if name == self.wanted and self.seen is None:
            if isinstance(tokens, TokenGroups) and (inverted or layer.fn.queries_contribute_kv):  # as its forward does
                raise ValueError("PreNorm: expected plain attention to groups of tokens")
            self.seen = Attended.of(layer, z, tokens, mask, inverted)
        elif name == self.wanted and self.seen is not None:
            self.seen.parts.append(z)
        if self.seen is not None and (name != self.wanted or (self.last is not None and self.seen.count > self.last)):
            raise _Stop


def _observe(who: str, model: nn.Module, data, layer: int | str, last: int | None, mask, inputs: dict) -> Attended:
    """Run the model as in inference up to a layer, and return what that was called with; its modes stay as they were.

    ``who`` is the caller, for messages; ``last`` the last row of ``z`` that is needed, None for all.
    """
    check_whole(who, model, data)
    layers = dict(layers_of(model, is_attention))
    if not layers:
        raise TypeError(f"{who}: expected a perceiver_fast model, got {type(model).__name__}")
    if isinstance(layer, str) and layer not in layers:
        if f"{layer}.fn" not in layers:
            crosses = [name for name, module in layers.items() if is_cross_attention(module)]
            raise ValueError(
                f"{who}: expected layer to be one of {', '.join(crosses or layers)}, got {layer!r}; "
                "pf.explain(model, data) names them all"
            )
        layer = f"{layer}.fn"  # explain's name is that of the layer with its norm
    look = _Look(layers, layer, last)
    training = [module for module in model.modules() if module.training]
    try:
        with observing(look):
            if training:  # else nothing is written: other threads may be calling the model
                model.eval()
            model(data, **(inputs if mask is None else inputs | {"mask": mask}))
    except _Stop:
        pass
    finally:
        for module in training:
            module.training = True
    if look.seen is None:
        if isinstance(layer, str):
            raise ValueError(f"{who}: layer {layer!r} did not run on this input; ran: {', '.join(look.ran) or 'none'}")
        expected = f"layer in 0..{len(look.ran) - 1}" if look.ran else "the name of a layer, as no cross-attention ran"
        raise IndexError(f"{who}: expected {expected}, got {layer}")
    look.seen.parts = [look.seen.z]
    return look.seen


def _modalities(model: nn.Module, data) -> Sequence[str]:
    """The names of the modalities that are there, in the order of their groups of tokens."""
    for module in model.modules():
        if isinstance(module, MultimodalPerceiver) and isinstance(data, Mapping):
            return [modality.name for modality in module.modalities if modality.name in data]
    return ()


def _unflatten(maps: Tensor, data) -> Tensor:
    """Maps ``[.., M]`` on the axes of ``data [B, n_1, .., n_A, F]``, where those are of M tokens."""
    sizes = data.shape[1:-1] if isinstance(data, Tensor) else data.sizes if isinstance(data, Description) else ()
    return maps.unflatten(-1, sizes) if len(sizes) > 1 and prod(sizes) == maps.shape[-1] else maps


def _weights_shape(seen: Attended) -> tuple[int, int, int]:
    """Batch size, heads, and the number of tokens that weights are over."""
    fn = seen.attention
    batch = seen.groups[0].batch if seen.groups else seen.z.shape[0]
    own = seen.count if _attends_itself(seen) else 0
    return batch, fn.heads, own + sum(group.count for group in seen.groups)


def _weights(seen: Attended, rows: Sequence[int]) -> Tensor:
    """Attention weights of some of the N rows of ``seen.z``, ``[B, H, rows, M]``, M the tokens of all groups joined.

    Nothing larger exists but the keys of PIECE tokens and, for inverted attention, their logits of all rows.
    """
    z = seen.z if seen.inverted else seen.z[:, rows]
    batch, heads, total = _weights_shape(seen)
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


def _attends_itself(seen: Attended) -> bool:
    """Whether what attends is among what is attended to: then it comes first, and is never masked."""
    return not seen.groups or seen.layer.fn.queries_contribute_kv


def _pieces(seen: Attended, z: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Logits ``[B, H, n, m]`` of ``z [B, n, D]`` and masks ``[B, m]`` of all that is attended to, m tokens at a time."""
    fn = seen.attention
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


def _keys(layer: Any, tokens: Tokens, piece: slice, plain: bool) -> Tensor:
    """Keys of a piece of tokens, ``[B, m, H d]``; where layers are more than their parameters they are called."""
    if not plain:
        return layer.fn.to_kv(layer.norm_context(tokens.tensor()[:, piece])).chunk(2, -1)[0]
    tokens = tokens.part(piece)
    weight = layer.fn.to_kv.weight
    to_k: Any = SimpleNamespace(weight=weight[: weight.shape[0] // 2])  # values are not needed
    return tokens.keys_values(to_k, layer.norm_context)


def _grid_logits(layer: Any, z: Tensor, tokens: GridTokens, pieces: Sequence[slice]) -> Iterator[Tensor]:
    """Logits over pieces of a grid, whose keys are not formed."""
    constant: Any  # asked for, so it is there
    q, constant, *_ = FusedCrossAttention(layer).grid_tables(z, tokens)
    q_feat, *q_axes = q.split([tokens.elements, *tokens.sizes], -1)
    feat = tokens.shifted().flatten(1, -2).unsqueeze(1)
    scale = tokens.scale(layer.norm_context.eps).flatten(1)[:, None, None]
    for piece in pieces:
        indices = torch.arange(*piece.indices(tokens.count), device=z.device)
        with unless_autocast(z.device):
            sums = q_feat @ feat[:, :, piece].mT
        for q_axis, index in zip(q_axes, torch.unravel_index(indices, tokens.sizes)):
            sums += q_axis[..., index]
        yield sums * scale[..., piece] + constant.unsqueeze(-1)
