"""The op: LayerNorm's scale of tokens on a grid, beside the variance of built tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.layers import one_layer, token_channels
from benchmarks.ops import Problem, nbytes, op_benchmark
from benchmarks.throughput import Work
from perceiver_fast import ops
from perceiver_fast.insight.geometries import Geometry

LEVEL = "grid_scale"
EPS = 1e-5


def problem(geometry: Geometry, batch: int) -> Problem:
    """The tokens of ``geometry``; plain PyTorch is given their position codes."""
    data = geometry.input(batch)
    tokens = one_layer(geometry)[1](data)
    mean, square = (torch.cat([getattr(code, name) for code in tokens.codes]) for name in ("mean", "square"))
    widths = [code.code.shape[-1] for code in tokens.codes]
    codes = tokens.materialize()[:1, :, geometry.channels :]

    def eager(data: Tensor, codes: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        built = torch.cat([data.flatten(1, -2), codes.expand(data.shape[0], -1, -1)], -1)
        return (built.var(-1, correction=0) + EPS).rsqrt().view(data.shape[:-1])

    def fast(data: Tensor, codes: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        return ops.grid_scale(data, mean, square, widths, EPS)

    count = batch * geometry.tokens
    work = Work(batch, count, 0, nbytes(data, mean, square) + 4 * count)
    assert tokens.channels == token_channels(geometry)
    return Problem((data, codes, mean, square), {"eager": eager, "fast": fast}, work, wanted=1)


test_grid_scale = op_benchmark(LEVEL, problem, ("eager", "compile"))
