"""The op: bias and GEGLU."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.throughput import Work
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry

LEVEL = "geglu"
WIDENING = 4  # perceiver-pytorch's


def eager(h: Tensor, bias: Tensor) -> Tensor:
    """As perceiver-pytorch has it, the bias being its linear layer's."""
    values, gates = (h + bias).chunk(2, dim=-1)
    return values * F.gelu(gates)


def problem(geometry: Geometry, batch: int) -> Problem:
    """The wide hidden latents of a feed-forward of ``geometry``."""
    wide = WIDENING * geometry.model["latent_dim"]
    h, bias = random(batch, geometry.queries, 2 * wide), random(2 * wide, seed=5)
    rows = batch * geometry.queries
    work = Work(batch, rows, 0, nbytes(h) * 3 // 2)
    return Problem((h, bias), {"eager": eager, "fast": ops.geglu}, work, wanted=2)


test_geglu = op_benchmark(LEVEL, problem, ("eager", "compile"))
