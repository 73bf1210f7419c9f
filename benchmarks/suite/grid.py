"""Grid attention in C++ and in plain PyTorch, and dense attention that is given its keys and values: the same numbers.

With tokens' scale r, features x and axis tables, keys are ``K = r B Kt^T`` where ``B = [x, onehot, ..]`` is the basis
and ``Kt [d, L]`` the table of keys; values likewise. Grid attention takes ``q Kt`` and returns ``o`` with
``out = o Vt^T``, so outputs and gradients of either side convert into the other's.

The passes are the forward, a step (forward, and backward to the queries, as in training on fixed inputs) and a step with the
gradients of the tokens too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import perceiver_fast as pf
from benchmarks.sides import OURS, Case, Level, Peer, Results, Side, leaves, ours
from benchmarks.suite.layers import one_layer
from benchmarks.suite.plans import logits_bytes
from perceiver_fast.insight.geometries import Geometry

LAYER_NORM_EPS = 1e-5  # torch's default
REFERENCE_MATRICES = {"forward": 5, "step": 10, "step+tokens": 10}  # N x M matrices the reference holds at its peak


class Problem(NamedTuple):
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


@lru_cache(maxsize=1)  # for all passes and peers
def problem(geometry: Geometry, batch: int = 1) -> Problem:
    """The cross-attention of ``geometry`` with random queries and a random projection of its tokens."""
    generator = torch.Generator().manual_seed(2)
    head = geometry.dim_head
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


def dense_side(p: Problem, pass_name: str) -> Side:
    """torch's scaled_dot_product_attention on keys and values built beforehand, at no cost to it."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)

    def common(results: Results) -> Results:
        results = tuple(t.squeeze(1) for t in results)
        if pass_name != "step+tokens":
            return results
        out, dq, dk, dv = results
        features = p.feat.shape[-1]
        per_feature = dk @ p.key_table[:, :features] + dv @ p.value_table[:, :features]
        dscale = ((dk * p.keys).sum(-1) + (dv * p.values).sum(-1)) / p.scale
        return out, dq, p.scale.unsqueeze(-1) * per_feature, dscale

    wanted = {"forward": 0, "step": 1, "step+tokens": 3}[pass_name]
    inputs = leaves([t.unsqueeze(1) for t in (p.queries, p.keys, p.values)], wanted)
    return Side(attend, inputs, cotangents=(p.cotangent.unsqueeze(1),), common=common)


def grid_side(p: Problem, pass_name: str, backend: str) -> Side:
    """perceiver_fast.ops.grid_attention through ``backend``."""
    axes = len(p.sizes)
    parts = [p.feat.shape[-1], *p.sizes]

    def attend(*inputs: Tensor) -> Results:
        q_feat, *q_axes, feat, scale = inputs
        with pf.use_backend(backend):
            o_feat, o_axes, _ = pf.ops.grid_attention(q_feat, q_axes, feat, scale)
        return o_feat, *o_axes

    def common(results: Results) -> Results:
        out = torch.cat(results[: 1 + axes], -1) @ p.value_table.T
        if pass_name == "forward":
            return (out,)
        dq = torch.cat(results[1 + axes : 2 + 2 * axes], -1) @ p.key_table.T
        return out, dq, *results[2 + 2 * axes :]

    wanted = {"forward": 0, "step": 1 + axes, "step+tokens": 3 + axes}[pass_name]
    inputs = leaves((*(p.queries @ p.key_table).split(parts, -1), p.feat, p.scale), wanted)
    return Side(attend, inputs, cotangents=(p.cotangent @ p.value_table).split(parts, -1), common=common)


def truth(case: Case) -> Side:
    """torch's own attention in float64, which shares no code with the op."""
    p = problem(case.geometry, case.batch)
    sizes, *tensors = p
    return dense_side(Problem(sizes, *(t.double() for t in tensors)), case.pass_name)


def needs(case: Case) -> dict[str, int]:
    """The memory of plain PyTorch, which builds the logits."""
    if case.peer != "reference":
        return {}
    return {"the reference": REFERENCE_MATRICES[case.pass_name] * logits_bytes(case.geometry, case.batch)}


def _grid(backend: str) -> Callable[[Case], Side]:
    return lambda case: grid_side(problem(case.geometry, case.batch), case.pass_name, backend)


PEERS = {
    "reference": Peer(_grid("reference")),
    "sdpa": Peer(lambda case: dense_side(problem(case.geometry, case.batch), case.pass_name)),
    OURS: ours(_grid("cpu")),
}
LEVEL = Level(PEERS, truth, lambda geometry: 1, needs=needs, passes=("forward", "step", "step+tokens"))
