"""A small model's cross-attention to a grid, added to the latents by one op."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers.cross_attention import why_cross_attention_modules
from perceiver_fast.layers.fusing import are_plain, is_plain
from perceiver_fast.layers.plan import SMALL, grid_work
from perceiver_fast.layers.residual_stream import ResidualStream, fits
from perceiver_fast.layers.small import is_small
from perceiver_fast.ops.grid_cross_attention import GRID_CROSS_ATTENTION, grid_cross_attention
from perceiver_fast.tokens import GridTokens


@functools.lru_cache(256)
def _takes_grid(sizes: tuple[int, ...], features: int, rows: int, dims: int) -> bool:
    """Whether layers/plan.py takes the grid's way for its small error alone: then no plan need be made."""
    return grid_work(1, rows, sizes, features, dims).cost < SMALL


def add_grid_cross_attention(
    stream: ResidualStream, layer: nn.Module, context: object, mask: Tensor | None, inverted: bool
) -> bool:
    """Add ``layer(x, context=context, mask=mask)`` to a stream x, and return True; or leave it as it is, and return False.

    Args:
        stream: the latents.
        layer: a PreNorm that is plain itself.
        context: what it attends to; only tokens on a grid are attended to here.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to; or None.
        inverted: softmax over the latents; not here.
    """
    if type(context) is not GridTokens or inverted or not is_small(stream, GRID_CROSS_ATTENTION):
        return False
    parameters = _parameters(layer, context, stream)
    if parameters is None or not are_plain(mask, *context.sources()):
        return False
    fn, norm = layer._modules["fn"], layer._modules["norm"]
    heads, inner = fn.heads, parameters[2].shape[0]
    rows = heads * stream.shape[1]
    if not _takes_grid(context.sizes, context.features, rows, 2 * inner // heads):
        return False
    scale = context.scale(layer._modules["norm_context"].eps)
    mask = None if mask is None else mask.reshape(scale.shape)
    codes = [axis.code for axis in context.codes]
    arguments = parameters, heads, float(fn.scale), norm.eps
    stream.become(grid_cross_attention(stream.rows(), context.feat, scale, mask, codes, *arguments))
    return True


def _parameters(layer: nn.Module, tokens: GridTokens, stream: ResidualStream) -> list[Tensor] | None:
    """The parameters of ``layer``, as the op takes them; None if it may not stand in for the layers inside."""
    if tokens.dtype is not stream.dtype or tokens.features == 0 or tokens.order is not None or tokens.is_shifted:
        return None
    if tokens.learns() or tokens.was_changed() or why_cross_attention_modules(layer) is not None:
        return None
    modules: dict[str, Any] = layer._modules
    norm, norm_context, fn = modules["norm"], modules["norm_context"], modules["fn"]
    to_q, to_kv, to_out = (fn._modules[name] for name in ("to_q", "to_kv", "to_out"))
    if not fits(norm, stream.rows()) or norm.eps <= 0 or fn.active_dropout > 0 or fn.queries_contribute_kv:
        return None
    if not is_plain(to_q, nn.Linear) or to_q._parameters["bias"] is not None or not is_plain(to_out, nn.Linear):
        return None
    parameters = [
        norm._parameters["weight"], norm._parameters["bias"], to_q._parameters["weight"],
        norm_context._parameters["weight"], norm_context._parameters["bias"], to_kv._parameters["weight"],
        to_out._parameters["weight"], to_out._parameters["bias"],
    ]  # fmt: skip
    dtype, device = stream.dtype, stream.device
    if any(p is None or p.dtype is not dtype or p.device != device for p in parameters):
        return None
    inner, width, channels = to_q._parameters["weight"].shape[0], stream.shape[2], tokens.channels
    shapes = (width,), (width,), (inner, width), (channels,), (channels,), (2 * inner, channels), (width, inner), (width,)
    fit = all(p.shape == shape for p, shape in zip(parameters, shapes))
    return parameters if fit and inner % fn.heads == 0 else None
