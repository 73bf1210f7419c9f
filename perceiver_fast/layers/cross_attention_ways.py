"""The three ways of a cross-attention; layers/plan.py decides which of them a call takes.

    grid       [K | V] = W' [I_F | E_1^T | .. | E_A^T], W' = W minus its row means (LayerNorm's centring is linear):
               keys and values of the basis [x, onehot, .., onehot];  q = to_q(x) K / sqrt(d);  out = o V^T + b_v
    absorbed   q = to_q(x) W_k / sqrt(d) attends to the normalised tokens themselves, or to what a linear layer makes
               them of, times LayerNorm's scale;  out = o W_v^T + b_v
    projected  keys and values are built:  to_kv(norm(tokens))

A bias on keys adds the same to all logits of a query, which a softmax over the tokens does not notice. Inverted
attention notices, so there the bias is one more channel of the tokens. A bias on values counts as often as the weights
sum to, which with dropout and inverted attention is not once.

Every way is a function of

    layer     the layer's parameters
    z         normalised latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them
    tokens    a description of what is attended to
    mask      bool ``[B, M]``, True where a token may be attended to, or None
    inverted  softmax over the latents, then normalised over the tokens
    with_lse  whether the log-sum-exp is needed, as it is to merge groups of tokens
    backend   what runs the attention, as the plan has chosen it

and returns ``[B, N, H, d]`` and the log-sum-exp of the logits ``[B, N, H]``, or None if it is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from perceiver_fast.layers.cross_attention_parameters import CrossAttentionParameters, times_tables
from perceiver_fast.ops.cross_attention import cross_attention_unchecked, kernel_dtype
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.library import half_dtype, learns, unless_autocast
from perceiver_fast.ops.projected_attention import projected_attention, rows_of_pieces
from perceiver_fast.tokens import GridTokens, Tokens

Result = tuple[Tensor, Tensor | None]
LEAST_SCALE = 2.0**-60


def attend_grid(
    layer: CrossAttentionParameters,
    z: Tensor,
    tokens: GridTokens,
    mask: Tensor | None,
    inverted: bool,
    with_lse: bool,
    backend: str,
) -> Result:
    """Attend to raw channels and one table entry an axis and index; no token, key or value is built."""
    heads, features = layer.fn.heads, tokens.elements
    half = half_dtype(z.device, tokens.dtype)
    on_gpu = backend in ("cuda", "triton") and not transformed()
    feat = tokens.shifted(half if on_gpu and features > 0 and not inverted else None)
    logit_bias: Any  # None where nobody needs it
    # Plain PyTorch would round keys, weights and values to this dtype. Others could overflow, and compilers may not know it.
    narrow = half == torch.bfloat16 and on_gpu and not is_compiling()
    q, logit_bias, values, value_bias = layer.grid_tables(z, tokens, inverted or with_lse, narrow)
    with unless_autocast(z.device):
        scale = tokens.scale(layer.norm_context.eps)
        if inverted:  # the keys' bias: a channel that is one after scaling, and the bias as its query
            feat, scale = with_ones(feat, scale)
            raw, axes = q.split([features, q.shape[-1] - features], -1)
            q = torch.cat([raw, logit_bias.unsqueeze(-1), axes], -1)
        elif features == 0:  # the op takes at least one channel
            feat, q = feat.new_zeros(*feat.shape[:-1], 1), torch.cat([q.new_zeros(*q.shape[:-1], 1), q], -1)
        q = q.flatten(1, 2).expand(feat.shape[0], -1, -1)
        mask = None if mask is None else mask.reshape(feat.shape[:-1])
        dropout = layer.fn.active_dropout
        o, lse, weight_sums = grid_attention_unchecked(
            q, feat, scale, mask, dropout, inverted, heads, half, backend, layer.seed(tokens.first, z.device)
        )
        o = o.unflatten(1, (heads, -1))
        if inverted or features == 0:
            raw, _, axes = o.split([features, 1, o.shape[-1] - features - 1], -1)
            o = torch.cat([raw, axes], -1)
        out = times_tables(o, values, narrow).transpose(1, 2) + layer.weighted_bias(value_bias, weight_sums)
        if not with_lse:
            return out, None
        return out, lse.unflatten(1, (heads, -1)).transpose(1, 2) + logit_bias.transpose(1, 2)


def with_ones(feat: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Raw channels with one more, which times the scale is one, and the scale.

    A token whose variance overflowed has a scale of zero, no multiple of which is one. LayerNorm makes zeros of it: so
    do channels of zero, and a scale beside which the codes of its position vanish.

    Args:
        feat: ``[B, *sizes, F]``.
        scale: ``[B, *sizes]``.
    """
    lost = scale == 0
    feat, scale = feat.masked_fill(lost.unsqueeze(-1), 0.0), scale.masked_fill(lost, LEAST_SCALE)
    return torch.cat([feat, 1 / scale.unsqueeze(-1)], -1), scale


def attend_absorbed(
    layer: CrossAttentionParameters,
    z: Tensor,
    tokens: Tokens,
    mask: Tensor | None,
    inverted: bool,
    with_lse: bool,
    backend: str,
) -> Result:
    """Attend to the normalised tokens ``[B, M, C]`` themselves (or their basis), as keys and as values of every head."""
    heads, dropout = layer.fn.heads, layer.fn.active_dropout
    half = half_dtype(z.device, tokens.feat.dtype)
    dtype = tokens.compute
    with unless_autocast(z.device):
        basis = tokens.basis(layer.to_kv, layer.norm_context)
        keys, key_bias, values, value_bias = layer.by_head(basis.weight, basis.bias)
    # A channel of ones puts the keys' bias into the logits, and its result is what the weights sum to.
    has_ones = inverted or dropout > 0
    logit_bias: Any  # None where nobody needs it
    q, logit_bias = layer.queries(z, keys, key_bias if has_ones or with_lse else None)
    with unless_autocast(z.device):
        context = basis.feat.to(dtype)
        if basis.scale is not None:
            context = context * basis.scale.to(dtype).unsqueeze(-1)
        if has_ones:
            context = torch.cat([context, context.new_ones(1).expand(*context.shape[:-1], 1)], -1)
            q = torch.cat([q, logit_bias.unsqueeze(-1)], -1)
        q = q.expand(context.shape[0], -1, -1, -1)
        if inverted:  # every head has a softmax of its own, over its queries
            context = context.unsqueeze(1).expand(-1, heads, -1, -1)
        else:  # all heads attend to the same, as if they were queries of one head
            q, context = q.flatten(1, 2).unsqueeze(1), context.unsqueeze(1)
        if half is not None:
            q, context = q.to(half), context.to(half)
        values_view = context.view(context.shape)  # keys and values are one tensor, but two inputs
        found: Any = cross_attention_unchecked(
            q, context, values_view, mask, dropout, inverted, 1.0, with_lse, backend, layer.seed(tokens.first, z.device)
        )
        lse: Any  # None where nobody needs it
        o, lse = found if with_lse else (found, None)
        o = o.to(values.dtype)
        o = o.reshape(o.shape[0], heads, z.shape[1], o.shape[-1])
        weight_sums = None
        if has_ones:
            o, weight_sums = o[..., :-1], o[..., -1].flatten(1)
        out = times_tables(o, values.transpose(1, 2)).transpose(1, 2) + layer.weighted_bias(value_bias, weight_sums)
        if not with_lse:
            return out, None
        lse = lse.view(o.shape[:3]).transpose(1, 2)
        return out, lse if has_ones else lse + logit_bias.transpose(1, 2)


def attend_projected(
    layer: CrossAttentionParameters,
    z: Tensor,
    tokens: Tokens,
    mask: Tensor | None,
    inverted: bool,
    with_lse: bool,
    backend: str,
) -> Result:
    """Attend to keys and values that are built, those of the queries before them with queries_contribute_kv.

    Many tokens are taken in pieces, see ops/projected_attention.py.
    """
    fn = layer.fn
    own = backend == "cpu"  # kernels with sums in float32: what need not be rounded for them is not
    with unless_autocast(z.device) if own and not tokens.half_product else nullcontext():
        projection = tokens.projection(layer.to_kv, layer.norm_context)
    plain = backend == "cpu" and not inverted and fn.active_dropout == 0 and not fn.queries_contribute_kv
    if projection is not None and plain:
        q = layer.to_q(z)
        rows = rows_of_pieces(q.shape[-2], q.shape[-1], learns(q), projection, mask)
        if rows > 0:
            q = fn.split_heads(q.to(projection.dtype).expand(tokens.batch, -1, -1))
            return _latents_first(*projected_attention(q, projection, rows, mask, fn.scale, with_lse))
    with unless_autocast(z.device) if own and not tokens.half_product else nullcontext():
        if projection is not None:
            kv = projection.keys_values()
        else:
            kv = tokens.keys_values(layer.to_kv, layer.norm_context)
        kv = kv.to(kernel_dtype(kv.dtype, with_lse)) if own else kv  # rows as they lie, of all heads at once
    q = layer.to_q(z).to(kv.dtype).expand(kv.shape[0], -1, -1)
    if fn.queries_contribute_kv:
        z = z.expand(kv.shape[0], -1, -1)
        kv = torch.cat([fn.project("to_kv", z).to(kv.dtype), kv], 1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(mask.shape[0], z.shape[1]), mask], -1)
    if 2 * q.shape[-1] != kv.shape[-1]:  # to_q may be anything that somebody put there
        raise ValueError(
            f"PreNorm: expected {kv.shape[-1] // 2} channels of fn.to_q, as many as fn.to_kv has for keys, "
            f"got {q.shape[-1]}; give both the same heads and channels"
        )
    q, k, v = (fn.split_heads(t) for t in (q, *kv.chunk(2, dim=-1)))
    found: Any = cross_attention_unchecked(
        q, k, v, mask, fn.active_dropout, inverted, fn.scale, with_lse, backend, layer.seed(tokens.first, z.device)
    )
    return _latents_first(*(found if with_lse else (found, None)))


def _latents_first(out: Tensor, lse: Tensor | None) -> Result:
    """``[B, H, N, d]`` and ``[B, H, N]`` with heads behind the latents."""
    return out.transpose(1, 2), None if lse is None else lse.transpose(1, 2)


WAYS: dict[str, Callable[..., Result]] = {
    "grid": attend_grid,
    "absorbed": attend_absorbed,
    "projected": attend_projected,
}
"""The function of every ``Plan.path``."""
