"""The op: a feed-forward's products with GEGLU between them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.test_geglu import WIDENING
from benchmarks.throughput import Work
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry

LEVEL = "feed_forward"


def eager(z: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor) -> Tensor:
    """As perceiver-pytorch has it."""
    values, gates = F.linear(z, weight1, bias1).chunk(2, dim=-1)
    return F.linear(values * F.gelu(gates), weight2)


def problem(geometry: Geometry, batch: int) -> Problem:
    """A feed-forward of the latents of ``geometry``."""
    width = geometry.model["latent_dim"]
    wide = WIDENING * width
    z = random(batch, geometry.queries, width)
    weight1 = random(2 * wide, width, seed=5) * width**-0.5
    weight2 = random(width, wide, seed=6) * wide**-0.5
    inputs = z, weight1, random(2 * wide, seed=7), weight2
    rows = batch * geometry.queries
    work = Work(batch, rows, 0, nbytes(*inputs) + z.nbytes)
    return Problem(inputs, {"eager": eager, "fast": ops.feed_forward}, work, wanted=4)


test_feed_forward = op_benchmark(LEVEL, problem, ("eager", "compile"))
