"""The op: LayerNorm of encoded positions, projected, beside perceiver-pytorch's functions for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_pytorch import fourier_encode
from torch import Tensor

from benchmarks.layers import token_channels
from benchmarks.ops import Problem, nbytes, op_benchmark, random
from benchmarks.throughput import Work
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry

LEVEL = "fourier_projection"
EPS = 1e-5


def problem(geometry: Geometry, batch: int) -> Problem:
    """Keys and values of the tokens of ``geometry``: points, or samples on one axis."""
    bands, max_freq = geometry.model["num_freq_bands"], geometry.model["max_freq"]
    points = geometry.family == "points"
    channels, width = token_channels(geometry), 128
    weight = random(channels, width) * channels**-0.5
    data = geometry.input(batch)
    axis = torch.linspace(-1.0, 1.0, geometry.tokens).view(1, -1, 1)

    def eager(weight: Tensor, data: Tensor) -> Tensor:
        codes = fourier_encode(data if points else axis.to(data), max_freq, bands).flatten(-2)
        tokens = codes if points else torch.cat([data, codes.expand(data.shape[0], -1, -1)], -1)
        return F.layer_norm(tokens, [channels], eps=EPS) @ weight

    def fast(weight: Tensor, data: Tensor) -> Tensor:
        where = {} if points else {"feat": data}
        return ops.fourier_projection(
            data if points else axis, weight, num_freq_bands=bands, max_freq=max_freq, norm_eps=EPS, **where
        )

    tokens = batch * geometry.tokens
    least = nbytes(weight, data) + 4 * tokens * width
    work = Work(batch, tokens, 0, least)
    return Problem((weight, data), {"eager": eager, "fast": fast}, work, wanted=1)


test_fourier_projection = op_benchmark(LEVEL, problem, ("eager", "compile"))
