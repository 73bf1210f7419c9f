"""The op: a branch and its bias join the residual stream, whose LayerNorm follows."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.throughput import Work
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.ops.layer_norm import add_layer_norm

LEVEL = "layer_norm"


def eager(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The normalised sum, and the sum."""
    y = x + (branch + branch_bias)
    return F.layer_norm(y, weight.shape, weight, bias), y


def fast(x: Tensor, branch: Tensor, branch_bias: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """perceiver-fast's op."""
    return add_layer_norm(x, branch, branch_bias, weight, bias)[::-1]


def problem(geometry: Geometry, batch: int) -> Problem:
    """Latents of ``geometry``."""
    width = geometry.model["latent_dim"]
    x, branch = (random(batch, geometry.queries, width, seed=seed) for seed in (4, 5))
    vectors = [random(width, seed=seed) for seed in (6, 7, 8)]
    rows = batch * geometry.queries
    work = Work(batch, rows, 0, 2 * nbytes(x, branch))
    return Problem((x, branch, *vectors), {"eager": eager, "fast": fast}, work, wanted=5)


test_layer_norm = op_benchmark(LEVEL, problem, ("eager", "compile"))
