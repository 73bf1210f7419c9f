"""A small model's cross-attention to tokens whose keys and values are built, by one op beside their projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers.cross_attention import FusedCrossAttention
from perceiver_fast.layers.fusing import why_not
from perceiver_fast.layers.plan import Plan
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.small import fit, is_small, most_half
from perceiver_fast.ops.latent_cross_attention import (
    LATENT_CROSS_ATTENTION,
    latent_cross_attention_unchecked,
    parameter_shapes,
)
from perceiver_fast.ops.library import autocast_dtype, dropout_seed, learns, seed_from, unless_autocast
from perceiver_fast.ops.linear import product_dtype
from perceiver_fast.ops.projected_attention import Projection, rows_of_pieces
from perceiver_fast.ranges import layer_range
from perceiver_fast.tokens import TokenGroups, Tokens, TokenStream
from perceiver_fast.tracing import own

# Multiply-adds of a fifth of a millisecond: the calls on the absorbed way take longer than those of the op.
LITTLE = 1e7


def latent_cross_attention_branch(
    layer: nn.Module,
    stream: ResidualStream,
    tokens: Tokens | TokenGroups | TokenStream,
    mask: Tensor | None,
    inverted: bool,
    adds: bool,
) -> Tensor | None:
    """``layer(x, context=tokens, mask=mask)`` of a stream x, or x and that, by one op; None where another way is faster.

    Only where :func:`perceiver_fast.layers.cross_attention.why_cross_attention_modules` is None.

    Args:
        layer: a PreNorm with a context.
        stream: the latents.
        tokens: what is attended to.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to; or None.
        inverted: softmax over the latents; not here.
        adds: whether the latents are added to what they find; if not, the result has the dtype of a product.
    """
    if inverted or not isinstance(tokens, Tokens) or tokens.shard is not None or tokens.count == 0:
        return None
    if tokens.dtype is not stream.dtype:
        return None
    if not is_small(stream, LATENT_CROSS_ATTENTION, tokens.batch):
        return None
    parameters = _parameters(layer, stream)
    if parameters is None:
        return None
    modules: dict[str, Any] = layer._modules
    fn, norm_context = modules["fn"], modules["norm_context"]
    inner, latents, dropout = len(parameters[2]), stream.shape[1], fn.active_dropout
    if tokens.half_product and autocast_dtype(stream.device) is not None:
        # A library makes many keys and values faster, in that dtype.
        if tokens.batch * tokens.count * tokens.channels * 2 * inner > most_half():
            return None
    if not _builds(FusedCrossAttention(layer).plan(tokens, latents, masked=mask is not None)):
        return None
    mask = None if mask is None else mask.flatten(1)
    with unless_autocast(stream.device):  # what is computed in float32 is not rounded before
        projection = tokens.projection(fn._modules["to_kv"], norm_context)
        if projection is not None and dropout == 0:
            learning = learns(stream.rows(), *parameters)
            if rows_of_pieces(latents, inner, learning, projection, mask) > 0:
                return None
        y = _attend(layer, stream.rows(), tokens, projection, mask, parameters, adds)
    return y if adds else y.to(product_dtype(y))


def _builds(plan: Plan) -> bool:
    """Whether keys and values are built: that is the least work, or so little more that the calls on another way take longer."""
    if plan.taken.backend != "cpu":
        return False
    if plan.path == "absorbed" and "projected" in plan.work:
        return plan.work["projected"].cost - plan.work["absorbed"].cost < LITTLE
    return plan.path == "projected"


def _parameters(layer: nn.Module, stream: ResidualStream) -> list[Any] | None:
    """The parameters of ``layer`` on the latents' side, as the op takes them; None if it may not stand in for the layers inside."""
    modules: dict[str, Any] = layer._modules
    norm, fn = modules["norm"], modules["fn"]
    if why_not("", norm, nn.LayerNorm) is not None or norm.eps <= 0 or fn.why_modules() is not None:
        return None
    of = fn.projections()
    if of is None or fn.queries_contribute_kv or not 0 <= fn.active_dropout < 1:
        return None
    to_q, to_kv, to_out, to_out_bias = of
    parameters = [norm._parameters["weight"], norm._parameters["bias"], to_q, to_out, to_out_bias]
    shapes = parameter_shapes(stream.shape[2], len(to_q))
    if to_kv.dtype is not stream.dtype or not fit(parameters, shapes, stream):
        return None
    return parameters


@layer_range
def _attend(
    layer: Any,
    x: Tensor,
    tokens: Tokens,
    projection: Projection | None,
    mask: Tensor | None,
    parameters: list[Any],
    adds: bool,
) -> Tensor:
    modules: dict[str, Any] = layer._modules
    fn, eps = modules["fn"], modules["norm"].eps
    if projection is not None:
        keys_values = projection.keys_values()
    else:
        keys_values = tokens.keys_values(fn._modules["to_kv"], modules["norm_context"])
    mask = None if mask is None else own(mask)  # it is saved, and its owner may refill it before the backward
    seed = seed_from(dropout_seed(fn.active_dropout, x.device), tokens.first)
    return latent_cross_attention_unchecked(
        x, keys_values, mask, parameters, fn.heads, float(fn.scale), eps, fn.active_dropout, seed, adds
    )
