"""What pictures and pages count: memory and work of a cross-attention, from shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_fast.insight.geometries import GEOMETRIES, Geometry, Points
from perceiver_fast.layers.plan import Layer, Plan, Work, count_work, plan_cross_attention
from perceiver_fast.tokens import DenseTokens, GridTokens, Tokens

FLOAT = 4  # bytes
SHOWN = ("readme", "imagenet-lucid", "imagenet-paper", "hf-conv", "video", "modelnet", "audio-cross", "io-512", "io-32")


class Row(NamedTuple):
    """One geometry's cross-attention: built densely, and on the way that the planner takes."""

    name: str
    plan: Plan
    dense: Work
    fast: Work


def describe(geometry: Geometry) -> tuple[Tokens, Layer]:
    """A geometry's tokens without content and its first cross-attention, as the planner sees them on a CPU."""
    data = torch.empty(1, *geometry.sizes, geometry.channels)
    model = geometry.build()
    tokens = model.model.describe(data[..., :0], data) if isinstance(model, Points) else model.describe(data)
    return tokens, Layer(geometry.queries, geometry.heads, geometry.model.get("cross_dim_head", 64))


def work() -> list[Row]:
    """Counted work of one cross-attention of every geometry shown, a batch element."""
    rows = []
    for name in SHOWN:
        with FakeTensorMode():
            tokens, layer = describe(GEOMETRIES[name])
            plan = plan_cross_attention(tokens, layer)
            built = DenseTokens(torch.empty(1, tokens.count, tokens.channels))
            rows.append(Row(name, plan, count_work("projected", built, layer), plan.work[plan.path]))
    return rows


def memory(name: str) -> list[tuple[str, int, bool]]:
    """What exists in memory for one cross-attention of a grid: name, bytes in float32, and whether it is ours."""
    with FakeTensorMode():
        tokens, layer = describe(GEOMETRIES[name])
    if not isinstance(tokens, GridTokens):
        raise TypeError(f"memory: expected a geometry on a grid, got {name!r} of {tokens.kind}")
    rows, tables = layer.queries * layer.heads, tokens.features + sum(tokens.sizes)
    sizes = {
        ("encoded tokens", False): tokens.count * tokens.channels,
        ("their LayerNorm", False): tokens.count * tokens.channels,
        ("keys and values", False): tokens.count * 2 * layer.heads * layer.dim_head,
        ("weights, N x M", False): rows * tokens.count,
        ("raw tokens and their scales", True): tokens.count * (tokens.features + 1),
        ("queries' tables", True): rows * tables,
        ("results' tables", True): rows * tables,
    }
    return [(name, FLOAT * numbers, fast) for (name, fast), numbers in sizes.items()]
