"""Layers between two cross-attentions, added to the latents one after the other: by one op where the model is small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.fusing import why_not
from perceiver_fast.layers.pre_norm import BRANCHES, PreNorm, add_layer
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.small import fit, is_half, is_small
from perceiver_fast.layers.uses import uses
from perceiver_fast.ops.latent_layers import LATENT_LAYERS, latent_layers_again, latent_layers_unchecked
from perceiver_fast.ops.library import dropout_seed
from perceiver_fast.ops.self_attention import self_attention_backend


def add_layers(stream: ResidualStream, layers: Sequence[nn.Module], watched: bool) -> None:
    """Add layers to a stream, each to what the ones before it made of that.

    Args:
        stream: the latents.
        layers: PreNorms without context, or whatever was put in their place.
        watched: whether modules have to be called in any case: see :func:`perceiver_fast.layers.fusing.is_watched`.
    """
    if not watched and layers and is_small(stream, LATENT_LAYERS, stream.shape[0]):
        arguments = _arguments(stream, layers)
        if arguments is not None:
            x = stream.value()
            parameters, heads, scales, eps, dropouts = arguments
            drops = (dropouts, _drawn(x, heads, dropouts)) if any(dropouts) else ()
            options = heads, scales, eps, *drops
            if (shared := uses()) is None:
                y = latent_layers_unchecked(x, parameters, *options)
            elif shared.again:
                y, returned = latent_layers_again(x, shared.take(parameters), *options)
                shared.keep(parameters, returned)
            else:
                y = latent_layers_unchecked(x, shared.take(parameters), *options)
            stream.become(y)
            return
    for layer in layers:
        add_layer(stream, layer, watched)


def _arguments(
    stream: ResidualStream, layers: Sequence[nn.Module]
) -> tuple[list[Any], list[int], list[float], list[float], list[float]] | None:
    """The parameters, heads, scales, eps and dropouts of layers, as the op takes them; None if it may not stand in for all."""
    width = stream.shape[2]
    parameters: list[Any] = []
    heads, scales, eps, dropouts = [], [], [], []
    for layer in layers:
        if why_not("", layer, PreNorm) is not None:
            return None
        modules: dict[str, Any] = layer._modules
        norm, fn = modules["norm"], modules["fn"]
        if modules.get("norm_context") is not None or why_not("", norm, nn.LayerNorm) is not None or norm.eps <= 0:
            return None
        if why_not("", fn, *BRANCHES) is not None or fn.why_modules() is not None:
            return None
        of = fn.projections()
        if of is None:
            return None
        attention, inner = isinstance(fn, Attention), of[2].shape[1]
        own = [norm._parameters["weight"], norm._parameters["bias"], *of]
        second = (2 * inner, width) if attention else (2 * inner,)
        first = (inner, width) if attention else (2 * inner, width)
        if not fit(own, ((width,), (width,), first, second, (width, inner), (width,)), stream):
            return None
        parameters += own
        heads.append(fn.heads if attention else 0)
        scales.append(float(fn.scale) if attention else 1.0)
        eps.append(norm.eps)
        dropouts.append(fn.active_dropout)
        if attention and dropouts[-1] != 0 and not _drops_alike(dropouts[-1], stream):
            return None
    return parameters, heads, scales, eps, dropouts


def _drops_alike(dropout: float, stream: ResidualStream) -> bool:
    """Whether attention by itself would drop the same weights: not a share that it refuses, nor where torch's attention runs."""
    torchs = is_half(stream) and self_attention_backend(torch.bfloat16, stream.device) != "cpu"
    return 0 < dropout < 1 and not torchs


def _drawn(x: Tensor, heads: Sequence[int], dropouts: Sequence[float]) -> list[Tensor]:
    """What decides what dropout drops, as the op takes it: a seed for attention, numbers to multiply with for a feed-forward.

    Drawn in the order of layers that are called one by one, which drop the same with the same seed of torch's generator.
    """
    drawn = []
    for count, dropout in zip(heads, dropouts):
        seed = dropout_seed(dropout, x.device) if count > 0 else None
        if seed is None and dropout > 0:
            seed = F.dropout(x.new_ones(x.shape), dropout)
        drawn.append(x.new_empty(0) if seed is None else seed)
    return drawn
