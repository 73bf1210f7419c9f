"""Layers between two cross-attentions, added to the latents one after the other: by one op where the model is small.

What a call of a layer or an op costs does not depend on the number of latents. In a small model it is most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.fusing import why_not
from perceiver_fast.layers.pre_norm import BRANCHES, PreNorm, add_layer
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.small import is_small
from perceiver_fast.ops.latent_layers import LATENT_LAYERS, latent_layers


def add_layers(stream: ResidualStream, layers: Sequence[nn.Module], watched: bool) -> None:
    """Add layers to a stream, each to what the ones before it made of that.

    Args:
        stream: the latents.
        layers: PreNorms without context, or whatever was put in their place.
        watched: whether modules have to be called in any case: see :func:`perceiver_fast.layers.fusing.is_watched`.
    """
    if not watched and layers and is_small(stream, LATENT_LAYERS):
        x = stream.value()
        arguments = _arguments(x, layers)
        if arguments is not None:
            stream.become(latent_layers(x, *arguments))
            return
    for layer in layers:
        add_layer(stream, layer, watched)


def _arguments(
    x: Tensor, layers: Sequence[nn.Module]
) -> tuple[list[Tensor], list[int], list[float], list[float]] | None:
    """The parameters, heads, scales and eps of layers, as the op takes them; None if it may not stand in for all."""
    dtype, device, width = x.dtype, x.device, x.shape[-1:]
    parameters: list[Tensor] = []
    heads, scales, eps = [], [], []
    for layer in layers:
        if why_not("", layer, PreNorm) is not None:
            return None
        modules: dict[str, Any] = layer._modules
        norm, fn = modules["norm"], modules["fn"]
        if modules.get("norm_context") is not None or why_not("", norm, nn.LayerNorm) is not None:
            return None
        if why_not("", fn, *BRANCHES) is not None or fn.why_modules() is not None:
            return None
        of = fn.projections()
        if of is None or norm.eps <= 0:
            return None
        own = (norm._parameters["weight"], norm._parameters["bias"], *of)
        for p in own:
            if p is None or p.dtype is not dtype or p.device != device:
                return None
        if own[0].shape != width or own[2].shape[1:] != width or own[4].shape[:1] != width:
            return None
        parameters += own
        heads.append(fn.heads if isinstance(fn, Attention) else 0)
        scales.append(float(fn.scale) if isinstance(fn, Attention) else 1.0)
        eps.append(norm.eps)
    return parameters, heads, scales, eps
