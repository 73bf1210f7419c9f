"""The op: the widest product of the latents, which runs on the library that was measured fastest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.test_geglu import WIDENING
from benchmarks.throughput import Work
from perceiver_fast.cache import ParameterCache
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.ops.linear import linear

LEVEL = "linear"


def problem(geometry: Geometry, batch: int) -> Problem:
    """The first product of a feed-forward of ``geometry``."""
    width = geometry.model["latent_dim"]
    x = random(batch, geometry.queries, width)
    weight = random(2 * WIDENING * width, width, seed=5) * width**-0.5
    cache = ParameterCache()  # in inference a layer keeps its packed weights

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, cache=cache)

    rows = batch * geometry.queries
    work = Work(batch, rows, 0, nbytes(x, weight) + 4 * rows * len(weight))
    return Problem((x, weight), {"eager": F.linear, "fast": fast}, work, wanted=2)


test_linear = op_benchmark(LEVEL, problem, ("eager",))
