"""One cross-attention as grid attention and as attention over built keys and values: the same numbers, two ways.

With tokens' scale r, features x and axis tables, keys are ``K = r B Kt^T`` where ``B = [x, onehot, ..]`` is the basis
and ``Kt [d, L]`` the table of keys; values likewise. Grid attention takes ``q Kt`` and returns ``o`` with
``out = o Vt^T``, so outputs and gradients of either side convert into the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_fast as pf
from benchmarks.layers import one_layer
from perceiver_fast.insight.geometries import Geometry

LAYER_NORM_EPS = 1e-5  # torch's default


@dataclass(frozen=True)
class Problem:
    """Inputs of both sides for one head of dimension d."""

    sizes: tuple[int, ...]
    feat: Tensor  # [B, M, F]
    scale: Tensor  # [B, M]
    queries: Tensor  # [B, N, d], with 1 / sqrt(d) in them
    key_table: Tensor  # [d, L]
    value_table: Tensor  # [d, L]
    keys: Tensor  # [B, M, d]
    values: Tensor  # [B, M, d]
    cotangent: Tensor  # [B, N, d]


def problem(geometry: Geometry, batch: int = 1) -> Problem:
    """The cross-attention of ``geometry`` with random queries and a random projection of its tokens."""
    generator = torch.Generator().manual_seed(2)
    head = geometry.model.get("cross_dim_head", 64)
    tokens = one_layer(geometry)[1](geometry.input(batch))
    built = tokens.materialize()  # [B, M, C]
    channels = built.shape[-1]
    weight = torch.randn(2 * head, channels, generator=generator) * channels**-0.5
    weight -= weight.mean(1, keepdim=True)  # LayerNorm's centring
    feat_weight, *axis_weights = weight.split(
        [geometry.channels, *(code.code.shape[1] for code in tokens.codes)], dim=1
    )
    columns = [axis_weight @ code.code.T for axis_weight, code in zip(axis_weights, tokens.codes, strict=True)]
    key_table, value_table = torch.cat([feat_weight, *columns], dim=1).chunk(2)
    keys, values = F.linear(F.layer_norm(built, [channels]), weight).chunk(2, dim=-1)
    rows = batch, geometry.queries, head
    return Problem(
        sizes=geometry.sizes,
        feat=tokens.feat.flatten(1, -2),
        scale=(built.var(-1, correction=0) + LAYER_NORM_EPS).rsqrt(),
        queries=torch.randn(rows, generator=generator) * head**-0.5,
        key_table=key_table,
        value_table=value_table,
        keys=keys.contiguous(),
        values=values.contiguous(),
        cotangent=torch.randn(rows, generator=generator),
    )


@dataclass(frozen=True)
class Side:
    """``call() -> results`` is what is measured; ``common(results)`` makes them comparable with the other side's."""

    call: Callable[[], tuple[Tensor, ...]]
    common: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


def _runner(attend: Callable, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], wanted: int) -> Callable:
    """A call of ``attend(*inputs)`` that also returns the gradients of the first ``wanted`` inputs."""
    inputs = tuple(t.detach().requires_grad_(i < wanted) for i, t in enumerate(inputs))

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(wanted > 0):
            outputs = attend(*inputs)
        return (*outputs, *torch.autograd.grad(outputs, inputs[:wanted], cotangents)) if wanted else outputs

    return call


def dense_side(p: Problem, pass_name: str) -> Side:
    """torch's scaled_dot_product_attention on keys and values built beforehand, at no cost to it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (F.scaled_dot_product_attention(q, k, v, scale=1.0),)

    def common(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        results = tuple(t.squeeze(1) for t in results)
        if pass_name != "step+tokens":
            return results
        out, dq, dk, dv = results
        features = p.feat.shape[-1]
        per_feature = dk @ p.key_table[:, :features] + dv @ p.value_table[:, :features]
        dscale = ((dk * p.keys).sum(-1) + (dv * p.values).sum(-1)) / p.scale
        return out, dq, p.scale.unsqueeze(-1) * per_feature, dscale

    wanted = {"forward": 0, "step": 1, "step+tokens": 3}[pass_name]
    inputs = tuple(t.unsqueeze(1) for t in (p.queries, p.keys, p.values))
    return Side(_runner(attend, inputs, (p.cotangent.unsqueeze(1),), wanted), common)


def grid_side(p: Problem, pass_name: str, backend: str) -> Side:
    """perceiver_fast.ops.grid_attention through ``backend``."""
    axes = len(p.sizes)
    parts = [p.feat.shape[-1], *p.sizes]

    def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
        q_feat, *q_axes, feat, scale = inputs
        with pf.use_backend(backend):
            o_feat, o_axes, _ = pf.ops.grid_attention(q_feat, q_axes, feat, scale)
        return o_feat, *o_axes

    def common(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out = torch.cat(results[: 1 + axes], -1) @ p.value_table.T
        if pass_name == "forward":
            return (out,)
        dq = torch.cat(results[1 + axes : 2 + 2 * axes], -1) @ p.key_table.T
        return out, dq, *results[2 + 2 * axes :]

    wanted = {"forward": 0, "step": 1 + axes, "step+tokens": 3 + axes}[pass_name]
    inputs = (*(p.queries @ p.key_table).split(parts, -1), p.feat, p.scale)
    cotangents = (p.cotangent @ p.value_table).split(parts, -1)
    return Side(_runner(attend, tuple(t.contiguous() for t in inputs), cotangents, wanted), common)
