"""Attention of any library, from its parts: projections, norms, heads and a scale, read from modules at the call.

A family (transformers', perceiver-pytorch's and its forks', perceiver-io's) says which modules play which part
(:class:`Parts`); everything else is shared. Parts that are plain (layers/fusing.py) are computed with; others, such as an
adapter around a projection, are called, on tensors.

    q = to_q(norm(x))      k, v = to_k(norm_context(c)), to_v(norm_context(c))      softmax(q k^T scale + mask) v

A bias on keys adds the same to all logits of a query, which a softmax over the tokens does not notice: it is left out, and
its gradient is zero. A bias on values is added afterwards where weights sum to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.described import built, description
from perceiver_fast.layers.cross_attention_parameters import CrossAttentionParameters
from perceiver_fast.layers.cross_attention_ways import attend_absorbed, attend_grid
from perceiver_fast.layers.fusing import is_plain, why_not
from perceiver_fast.layers.plan import Layer, Plan, plan_cross_attention
from perceiver_fast.layers.residual_stream import normalize, shared_rows
from perceiver_fast.ops.cross_attention import cross_attention_unchecked
from perceiver_fast.ops.library import learns
from perceiver_fast.ops.linear import linear, product_dtype
from perceiver_fast.ops.self_attention import self_attention as latents_attention
from perceiver_fast.ops.self_attention import self_attention_backend
from perceiver_fast.ops.work import Work, attention_work
from perceiver_fast.tokens import DenseTokens, TokenGroups, Tokens, merge_parts
from perceiver_fast.tracing import trainable

FLOAT = 4  # bytes


@dataclass
class Parts:
    """The modules of one attention, and its numbers, as they are at the call.

    Attributes:
        heads: H.
        scale: of the logits.
        dropout: probability of dropping an attention weight in the current mode.
        norm, norm_context: LayerNorm of what asks and of what is attended to; None where there is none.
        to_q: to ``[.., H d]``.
        to_kv: to keys and values: one module of ``[.., H d + H dv]``, or two.
        keys: channels of the keys of all heads, H d; None: half of what one module gives.
    """

    heads: int
    scale: float
    dropout: float
    norm: Any  # modules of any library: what they have is asked, not declared
    norm_context: Any
    to_q: Any
    to_kv: tuple[Any, ...]
    keys: int | None = None

    def why_tokens(self) -> str | None:
        """Why keys and values have to be computed by calling modules, in words; None if their parameters say all."""
        found = None
        if self.norm_context is not None:
            found = why_not("the tokens' norm", self.norm_context, nn.LayerNorm)
            if found is None and self.norm_context._parameters["bias"] is None:
                found = "the tokens' norm has no bias"
        for layer in self.to_kv:
            found = found or why_not("a projection of keys and values", layer, nn.Linear)
        return found


@dataclass
class Joint:
    """Projections of keys and values as one, as a linear layer without bias."""

    weight: Tensor
    bias: None = None


@dataclass
class Numbers:
    """What the ways of layers/cross_attention_ways.py read from an attention."""

    heads: int
    scale: float
    active_dropout: float
    to_kv: Joint


class Parameters(CrossAttentionParameters):
    """The parameters of a cross-attention whose tokens' side is plain, for the ways of layers/cross_attention_ways.py."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.norm_context = parts.norm_context
        weights = [layer.weight for layer in parts.to_kv]
        biases = [layer.bias for layer in parts.to_kv]
        total = sum(map(len, weights))
        self.keys = parts.keys or (len(weights[0]) if len(weights) == 2 else total // 2)
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases)])
        self.bias = bias
        joint = Joint(weights[0] if len(weights) == 1 else torch.cat(weights))
        numbers: Any = Numbers(parts.heads, parts.scale, parts.dropout, joint)  # stand in for an Attention
        self.fn = numbers
        self.to_kv = numbers.to_kv
        self._q = self._seed = None

    @property
    def dim_head(self) -> int:
        return self.keys // self.fn.heads

    @property
    def dim_value(self) -> int:
        """Channels of a head's values."""
        return (len(self.fn.to_kv.weight) - self.keys) // self.fn.heads

    def to_q(self, z: Tensor) -> Tensor:
        if self._q is None:
            self._q = project(self.parts.to_q, z)
        return self._q

    def by_head(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.bias is not None:
            bias = bias + self.bias.to(bias.dtype)
        (keys, values), (key_bias, value_bias) = (t.split([self.keys, len(t) - self.keys]) for t in (weight, bias))
        keys, key_bias, values, value_bias = (
            t.unflatten(0, (self.fn.heads, -1)) for t in (keys, key_bias, values, value_bias)
        )
        return keys * self.fn.scale, key_bias * self.fn.scale, values, value_bias

    def plan(self, tokens: Tokens, queries: int, lse: bool, masked: bool) -> Plan:
        """The way with the least counted work."""
        layer = Layer(
            queries,
            self.fn.heads,
            self.dim_head,
            self.fn.active_dropout,
            lse=lse,
            masked=masked,
            dim_value=self.dim_value,
        )
        return plan_cross_attention(tokens, layer)

    def attend(
        self, z: Tensor, tokens: Tokens, keep: Tensor | None, with_lse: bool
    ) -> tuple[Tensor, Tensor | None, Plan]:
        """Attention to one group of tokens: ``[B, N, H, dv]``, the log-sum-exp ``[B, N, H]`` or None, and the plan.

        Args:
            z: normalised queries' side ``[B or 1, N, D]``.
            tokens: what is attended to.
            keep: bool ``[B, M]``, True where a token may be attended to; or None.
            with_lse: whether the log-sum-exp is needed.
        """
        plan = self.plan(tokens, z.shape[1], with_lse, keep is not None)
        out, lse = WAYS[plan.path](self, z, tokens, keep, False, with_lse, plan.taken.backend)
        return out, lse, plan


def attend_projected(
    layer: Parameters,
    z: Tensor,
    tokens: Tokens,
    keep: Tensor | None,
    inverted: bool,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Attend to keys and values that are built, which need not have the same channels."""
    kv = tokens.keys_values(layer.fn.to_kv, layer.norm_context)
    k, v = kv.split([layer.keys, kv.shape[-1] - layer.keys], -1)
    bias = None if layer.bias is None else layer.bias[layer.keys :].to(kv.dtype)
    if bias is not None and layer.fn.active_dropout > 0:
        v, bias = v + bias, None
    q = layer.to_q(z).to(kv.dtype).expand(kv.shape[0], -1, -1)
    q, k, v = (split_heads(t, layer.fn.heads) for t in (q, k, v))
    by_keys = None
    if with_lse and layer.bias is not None:  # other groups may come by ways that count it
        key_bias = layer.bias[: layer.keys].to(q.dtype).unflatten(0, (layer.fn.heads, -1))
        by_keys = torch.einsum("bhnd,hd->bnh", q, key_bias) * layer.fn.scale
    dropout, scale = layer.fn.active_dropout, layer.fn.scale
    found: Any = cross_attention_unchecked(q, k, v, keep, dropout, False, scale, with_lse, backend)
    lse: Any  # None where nobody needs it
    out, lse = found if with_lse else (found, None)
    out = out.transpose(1, 2)
    if bias is not None:
        out = out + bias.unflatten(0, (layer.fn.heads, -1))
    if not with_lse:
        return out, None
    return out, lse.transpose(1, 2) if by_keys is None else lse.transpose(1, 2) + by_keys


WAYS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "grid": attend_grid,
    "absorbed": attend_absorbed,
    "projected": attend_projected,
}


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``: by an op if the layer is a plain linear one, else by calling it."""
    if not is_plain(layer, nn.Linear):
        return layer(x)
    return linear(x.to(product_dtype(x)), layer.weight, layer.bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H d]`` to ``[B, H, N, d]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def normalized(norm: nn.Module | None, x: Tensor) -> Tensor:
    """``norm(x)``; ``x`` itself where there is no norm."""
    return x if norm is None or isinstance(norm, nn.Identity) else normalize(norm, x)


def eager_work(q: tuple[int, ...], keys: tuple[int, ...], dim_value: int, projections: int) -> Work:
    """The work of attention that writes its weights: logits, their scaled form, weights, each written and read again.

    Args:
        q: ``B, H, N, d``.
        keys: ``B, H, M, d``.
        dim_value: channels of a head's values.
        projections: multiply-adds of keys and values.
    """
    pairs = q[0] * q[1] * q[2] * keys[2]
    work = attention_work(q, keys, (*keys[:3], dim_value))
    return work + Work(projections, bytes=FLOAT * 6 * pairs)


def self_attention(parts: Parts, z: Tensor) -> tuple[Tensor, str, tuple[Work, Work]]:
    """Attention among the rows of ``z [B, N, D]``, normalised already.

    Returns:
        ``[B, N, H dv]``, the way in words, and the work as the class has it and as it is here.
    """
    q = project(parts.to_q, z)
    if len(parts.to_kv) == 1:
        kv = project(parts.to_kv[0], z)
        keys = parts.keys or kv.shape[-1] // 2
        k, v = kv.split([keys, kv.shape[-1] - keys], -1)
    else:
        k, v = (project(layer, z) for layer in parts.to_kv)
    q, k, v = (split_heads(t, parts.heads) for t in (q, k, v))
    out = latents_attention(q, k, v, parts.dropout, parts.scale)
    own = q.shape[-1] != v.shape[-1] or self_attention_backend(q.dtype, q.device) == "cpu"
    name = "streamed" if own else "torch's fused attention"
    before = eager_work(tuple(q.shape), tuple(k.shape), v.shape[-1], 0)
    return (
        out.transpose(1, 2).flatten(2),
        f"self-attention: {name}",
        (before, attention_work(q.shape, k.shape, v.shape)),
    )


def cross_attention(
    parts: Parts, z: Tensor, context: Tensor, keep: Tensor | None
) -> tuple[Tensor, str, tuple[Work, Work]]:
    """Attention of ``z`` to a context that is a tensor or described.

    Args:
        parts: the attention.
        z: normalised queries' side ``[B, N, D]``; where the whole batch shares it ``[1, N, D]``.
        context: ``[B, M, C]``.
        keep: bool ``[B, M]``, True where a token may be attended to; or None.

    Returns:
        ``[B, N, H dv]``, the way in words, and the work as the class has it and as it is here.
    """
    if parts.why_tokens() is not None or parts.norm_context is None:
        return _called(parts, z, built(context), keep)
    tokens = description(context)
    if tokens is None:
        tokens = DenseTokens(trainable(built(context)))
    layer, batch = Parameters(parts), context.shape[0]
    if isinstance(tokens, TokenGroups):
        groups, outs, lses, plans, start = tokens.groups, [], [], [], 0
        for group in groups:
            part = None if keep is None else keep[:, start : start + group.count]
            start += group.count
            lse: Any  # asked for, so it is there
            out, lse, plan = layer.attend(z, group, part, True)
            outs.append(out)
            lses.append(lse)
            plans.append(plan)
        out, _ = merge_parts(outs, lses, [group.count for group in groups])
        way = "groups: " + ", ".join(plan.path for plan in plans)
    else:
        out, _, plan = layer.attend(z, tokens, keep, False)
        plans, way = [plan], str(plan.path) + f": {plan.taken.op} on {plan.taken.backend}"
    if layer.bias is not None and learns(layer.bias):
        out = out + 0.0 * layer.bias.sum()  # keys' biases have no say in the result, but a gradient: zero
    rows, count = z.shape[1], context.shape[1]
    q, k = (batch, parts.heads, rows, layer.dim_head), (batch, parts.heads, count, layer.dim_head)
    projections = batch * count * context.shape[2] * len(layer.fn.to_kv.weight)
    before = eager_work(q, k, layer.dim_value, projections)
    after = sum((plan.work[plan.path] for plan in plans), Work())
    return out.expand(batch, -1, -1, -1).flatten(2), way, (before, after)


def _called(parts: Parts, z: Tensor, context: Tensor, keep: Tensor | None) -> tuple[Tensor, str, tuple[Work, Work]]:
    """Attention to a context whose norm or projections have to be called, or that has no norm."""
    context = normalized(parts.norm_context, context)
    if len(parts.to_kv) == 1:
        kv = project(parts.to_kv[0], context)
        keys = parts.keys or kv.shape[-1] // 2
        k, v = kv.split([keys, kv.shape[-1] - keys], -1)
    else:
        k, v = (project(layer, context) for layer in parts.to_kv)
    q = project(parts.to_q, z).expand(context.shape[0], -1, -1)
    q, k, v = (split_heads(t, parts.heads) for t in (q, k, v))
    out: Any = cross_attention_unchecked(q, k.to(q.dtype), v.to(q.dtype), keep, parts.dropout, scale=parts.scale)
    before = eager_work(tuple(q.shape), tuple(k.shape), v.shape[-1], 0)
    way = "streamed: keys and values by their modules"
    return out.transpose(1, 2).flatten(2), way, (before, attention_work(q.shape, k.shape, v.shape))


def queries_side(parts: Parts, x: Tensor) -> Tensor:
    """``norm(x)``, of one row where the whole batch shares it."""
    return normalized(parts.norm, shared_rows(x))
