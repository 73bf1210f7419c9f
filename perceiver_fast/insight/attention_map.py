"""Where chosen latents look: attention weights of a layer, for those latents only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from perceiver_fast.insight.observe import Attended, observe
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.models import MultimodalPerceiver

WEIGHTS = 2**24  # that exist at once where many latents are looked at


@torch.no_grad()
def attention_map(
    model: nn.Module,
    data,
    layer: int | str = 0,
    latents: Iterable[int] | None = None,
    mask=None,
    *,
    heads: str | None = None,
    **inputs,
) -> Tensor | dict[str | int, Tensor]:
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
        attention: after its normalisation over the tokens). Of several modalities a dict from their names to such maps,
        which sum to one together (groups of tokens without names: from their indices).

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
    seen = _observe(who, model, data, layer, 0 if chosen is None else max(chosen), mask, inputs)
    count = seen.z.shape[1]
    chosen = list(range(min(8, count))) if chosen is None else chosen
    if bad := [latent for latent in chosen if latent >= count]:
        raise IndexError(f"{who}: expected latents in 0..{count - 1}, got {bad}")
    maps = seen.weights(chosen)
    maps = maps.mean(1) if heads == "mean" else maps
    if not seen.grouped:
        return _unflatten(maps, data) if is_cross_attention(seen.layer) else maps
    names = _modalities(model, data) or range(len(seen.groups))
    parts = maps.split([group.count for group in seen.groups], -1)
    given = [data[name] if isinstance(data, Mapping) else None for name in names]
    return {name: _unflatten(part, of) for name, part, of in zip(names, parts, given)}


@torch.no_grad()
def contrasting_latents(
    model: nn.Module,
    data,
    layer: int | str = 0,
    count: int = 6,
    mask=None,
    *,
    candidates: int | None = None,
    **inputs,
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
    rows = min(seen.z.shape[1], candidates or seen.z.shape[1])
    at_once = max(1, WEIGHTS // max(1, prod(seen.shape)))
    found = []
    for start in range(0, rows, at_once):
        weights = seen.weights(range(start, min(start + at_once, rows)))
        relative = weights.mean(1) * weights.shape[-1]
        found.append(relative.var(-1, correction=0).mean(0))
    return torch.cat(found).argsort(descending=True, stable=True)[:count].tolist()


def _observe(who: str, model: nn.Module, data, layer: int | str, last: int | None, mask, inputs: dict) -> Attended:
    return observe(who, model, layer, last, data, inputs if mask is None else inputs | {"mask": mask})


def _modalities(model: nn.Module, data) -> Sequence[str]:
    """The names of the modalities that are there, in the order of their groups of tokens."""
    for module in model.modules():
        if isinstance(module, MultimodalPerceiver) and isinstance(data, Mapping):
            return [modality.name for modality in module.modalities if modality.name in data]
    return ()


def _unflatten(maps: Tensor, data) -> Tensor:
    """Maps ``[.., M]`` on the axes of ``data [B, n_1, .., n_A, F]``, where those are of M tokens."""
    sizes = data.shape[1:-1] if isinstance(data, Tensor) else ()
    return maps.unflatten(-1, sizes) if len(sizes) > 1 and sizes.numel() == maps.shape[-1] else maps
