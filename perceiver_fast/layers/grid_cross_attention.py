"""A small model's cross-attention to a grid, or to tokens that need no keys and values, added to the latents by one op."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.fusing import are_plain, why_not
from perceiver_fast.layers.plan import SMALL, Layer, grid_work, plan_cross_attention
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.small import fit, is_small
from perceiver_fast.ops.grid_cross_attention import (
    GRID_CROSS_ATTENTION,
    grid_cross_attention_unchecked,
    parameter_shapes,
)
from perceiver_fast.ops.library import dropout_seed, seed_from
from perceiver_fast.ranges import layer_range
from perceiver_fast.tokens import DenseTokens, EmbeddedGrid, GridTokens, PointTokens
from perceiver_fast.tracing import own

Served = GridTokens | PointTokens | DenseTokens


def add_grid_cross_attention(
    stream: ResidualStream, layer: nn.Module, context: object, mask: Tensor | None, inverted: bool
) -> bool:
    """Add ``layer(x, context=context, mask=mask)`` to a stream x, and return True; or leave it as it is, and return False.

    Args:
        stream: the latents.
        layer: a PreNorm that is plain itself.
        context: what it attends to; only tokens on a grid, dense tokens and points are attended to here.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to; or None.
        inverted: softmax over the latents; not here.
    """
    if not isinstance(context, Served) or isinstance(context, EmbeddedGrid) or inverted:
        return False
    if not is_small(stream, GRID_CROSS_ATTENTION, context.batch):
        return False
    if not _are_served(context, stream) or not are_plain(mask, *context.sources()):
        return False
    parameters = _parameters(layer, context, stream, mask is not None)
    if parameters is None:
        return False
    stream.become(_attend(layer, stream.rows(), context, mask, parameters))
    return True


def _are_served(tokens: Served, stream: ResidualStream) -> bool:
    """Whether the op takes tokens as they are: it knows raw channels and codes in their usual order, without gradients."""
    if tokens.dtype is not stream.dtype or tokens.order is not None or tokens.count == 0:
        return False
    if isinstance(tokens, GridTokens) and tokens.features == 0:
        return False
    if tokens.shard is not None:  # other processes have the rest of them
        return False
    return not tokens.was_changed() and not (torch.is_grad_enabled() and tokens.learns())


def _parameters(layer: nn.Module, tokens: Served, stream: ResidualStream, masked: bool) -> list[Any] | None:
    """The parameters of ``layer``, as the op takes them; None if it may not stand in for the layers inside."""
    modules: dict[str, Any] = layer._modules
    norm, norm_context, fn = modules["norm"], modules["norm_context"], modules["fn"]
    for module in norm, norm_context:
        if why_not("", module, nn.LayerNorm) is not None:
            return None
    if why_not("", fn, Attention, without_dropout.Attention) is not None or fn.why_modules() is not None:
        return None
    of = fn.projections()
    if of is None or fn.queries_contribute_kv or norm.eps <= 0:
        return None
    if fn.active_dropout != 0 and not (isinstance(tokens, GridTokens) and 0 < fn.active_dropout < 1):
        return None
    to_q, to_kv, to_out, to_out_bias = of
    norms = [module._parameters[name] for module in (norm, norm_context) for name in ("weight", "bias")]
    parameters = [*norms[:2], to_q, *norms[2:], to_kv, to_out, to_out_bias]
    inner, width, channels = len(to_q), stream.shape[2], tokens.channels
    shapes = parameter_shapes(width, inner, channels)
    if not fit(parameters, shapes, stream):
        return None
    dim_head = inner // fn.heads
    if isinstance(tokens, GridTokens):
        if _is_small_grid(tokens.sizes, tokens.elements, fn.heads * stream.shape[1], 2 * dim_head):
            return parameters
    plan = plan_cross_attention(tokens, Layer(stream.shape[1], fn.heads, dim_head, fn.active_dropout, masked=masked))
    if isinstance(tokens, GridTokens):
        return parameters if plan.path == "grid" else None
    return parameters if plan.path == "absorbed" and plan.taken.backend == "cpu" else None


@functools.lru_cache(256)
def _is_small_grid(sizes: tuple[int, ...], features: int, rows: int, dims: int) -> bool:
    """Whether layers/plan.py takes the grid's way for its small error alone: then no plan need be made."""
    return grid_work(1, rows, sizes, features, dims).cost < SMALL


@layer_range
def _attend(layer: Any, rows: Tensor, tokens: Served, mask: Tensor | None, parameters: list[Any]) -> Tensor:
    modules: dict[str, Any] = layer._modules
    fn, eps = modules["fn"], modules["norm_context"].eps
    feat: Any
    scale: Tensor | None
    if isinstance(tokens, GridTokens):
        feat, scale, codes = tokens.shifted(), tokens.scale(eps), [axis.code for axis in tokens.codes]
        mask = None if mask is None else mask.reshape(feat.shape[:-1])
    else:
        feat, scale, codes = tokens.normalized(eps), None, []
        mask = None if mask is None else mask.flatten(1)
    mask = None if mask is None else own(mask)  # it is saved, and its owner may refill it before the backward
    seed = seed_from(dropout_seed(fn.active_dropout, rows.device), tokens.first)
    options = fn.heads, float(fn.scale), modules["norm"].eps, fn.active_dropout, seed
    return grid_cross_attention_unchecked(rows, feat, scale, mask, codes, parameters, *options)
