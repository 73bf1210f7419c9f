"""The op: streaming attention on given queries, keys and values, beside torch's and the product that builds the weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.throughput import Work
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry

LEVEL = "cross_attention"
LANGUAGE_KEYS = 32  # channels of language's queries and keys; its values have the geometry's


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What perceiver-pytorch computes; the queries are scaled already."""
    return (q @ k.mT).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's, which takes one number of channels."""
    if q.shape[-1] < v.shape[-1]:
        q, k = (F.pad(t, (0, v.shape[-1] - t.shape[-1])) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def fast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """perceiver-fast's op."""
    return ops.cross_attention(q, k, v, scale=1.0)


def problem(geometry: Geometry, batch: int) -> Problem:
    """The attention of ``geometry`` on random queries, keys and values."""
    heads, channels = geometry.heads, geometry.model.get("cross_dim_head", 64)
    keys = LANGUAGE_KEYS if geometry.name == "language" else channels
    q = random(batch, heads, geometry.queries, keys, seed=4) * keys**-0.5
    k = random(batch, heads, geometry.tokens, keys, seed=5)
    v = random(batch, heads, geometry.tokens, channels, seed=6)
    pairs = batch * heads * geometry.queries * geometry.tokens
    least = nbytes(q, k, v) + 4 * batch * heads * geometry.queries * channels
    work = Work(batch, batch * geometry.tokens, pairs, least)
    return Problem((q, k, v), {"eager": eager, "sdpa": sdpa, "fast": fast}, work, wanted=3)


test_cross_attention = op_benchmark(LEVEL, problem, ("eager", "sdpa"))
