"""LayerNorm of a residual stream with the branch that joins it, forward and backward, each in one pass over memory.

    y = x + (branch + branch_bias),    hat = (y - mean) rstd,    z = hat weight + bias
    g = d_z weight,    d_x = d_y + rstd (g - mean(g) - hat mean(g hat))

Rows up to ``ONE_BLOCK`` wide are held in registers; wider ones are walked over in blocks of columns, three times in the
forward. The variance is that of the centred row, in two passes. y is rounded to the dtype of x before its statistics are
taken: they are those of what the backward reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.kernels.row_tiles import column_sums, tiles

ONE_BLOCK = 4096
# By the widest row: narrow ones within a warp, whose sums need no barrier; the last for rows beyond ONE_BLOCK.
FORWARD = {
    1024: Config(queries=1, tokens=1024, warps=1, registers=168),
    2048: Config(queries=1, tokens=2048, warps=4, registers=64),
    ONE_BLOCK: Config(queries=1, tokens=4096, warps=8, registers=64),
}
FORWARD_WIDE = Config(queries=1, tokens=2048, warps=8, registers=128)
# Of the sums of columns every program leaves 2 or 3 numbers a column: few programs, as many as registers hold at a time.
BACKWARD = {
    512: Config(queries=2, tokens=512, warps=1, registers=255),
    2048: Config(queries=1, tokens=2048, warps=4, registers=168),
    ONE_BLOCK: Config(queries=1, tokens=4096, warps=8, registers=255),
}
BACKWARD_WIDE = Config(queries=2, tokens=1024, warps=4, registers=128)


@triton.jit
def joined(x, branch, branch_bias, at, column, there, inside):
    """The stream with its branch at a tile, in float32 and rounded to the stream's dtype."""
    stream = tl.load(x + at, mask=there, other=0.0)
    if branch is not None:
        added = tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        if branch_bias is not None:
            added += tl.load(branch_bias + column, mask=inside, other=0.0).to(tl.float32)
        stream = (stream.to(tl.float32) + added).to(x.dtype.element_ty)
    return stream.to(tl.float32)


@triton.jit
def store_normed(z, values, weight, bias, at, column, there, inside):
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + at, (values * w + b).to(z.dtype.element_ty), mask=there)


@triton.jit
def corrections(sums, squares, eps, D: tl.constexpr):
    """What a mean is off, by the sums of the row centred by it: a large one's last bits are not small; and ``rstd``."""
    off = sums / D
    return off, tl.math.rsqrt(tl.maximum(squares / D - off * off, 0.0) + eps)


@triton.jit
def layer_norm_forward_kernel(
    x, branch, branch_bias, weight, bias, y, z, mean, rstd, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if D <= COLS:
        column = tl.arange(0, COLS)[None, :]
        inside = column < D
        there = (row < rows) & inside
        at = row * D + column
        values = joined(x, branch, branch_bias, at, column, there, inside)
        if branch is not None:
            tl.store(y + at, values.to(y.dtype.element_ty), mask=there)
        middle = tl.sum(values, 1, keep_dims=True) / D
        centred = tl.where(inside, values - middle, 0.0)
        sums, squares = tl.sum(centred, 1, keep_dims=True), tl.sum(centred * centred, 1, keep_dims=True)
        off, scale = corrections(sums, squares, eps, D)
        store_normed(z, (centred - off) * scale, weight, bias, at, column, there, inside)
    else:  # y is made three times, of what the cache still has: threads do not see what others of them have written
        sums = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.range(0, D, COLS):
            column = first + tl.arange(0, COLS)[None, :]
            inside = column < D
            there = (row < rows) & inside
            at = row * D + column
            values = joined(x, branch, branch_bias, at, column, there, inside)
            if branch is not None:
                tl.store(y + at, values.to(y.dtype.element_ty), mask=there)
            sums += values
        middle = tl.sum(sums, 1, keep_dims=True) / D
        sums = tl.zeros([ROWS, COLS], tl.float32)
        squares = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.range(0, D, COLS):
            column = first + tl.arange(0, COLS)[None, :]
            inside = column < D
            there = (row < rows) & inside
            values = joined(x, branch, branch_bias, row * D + column, column, there, inside)
            centred = tl.where(inside, values - middle, 0.0)
            sums += centred
            squares += centred * centred
        off, scale = corrections(tl.sum(sums, 1, keep_dims=True), tl.sum(squares, 1, keep_dims=True), eps, D)
        for first in tl.range(0, D, COLS):
            column = first + tl.arange(0, COLS)[None, :]
            inside = column < D
            there = (row < rows) & inside
            at = row * D + column
            values = joined(x, branch, branch_bias, at, column, there, inside)
            store_normed(z, (values - middle - off) * scale, weight, bias, at, column, there, inside)
    tl.store(mean + row, middle + off, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def normed(d_z, y, at, middle, scale, weights, there):
    """``d_z``, ``hat`` and ``g`` at a tile."""
    grad = tl.load(d_z + at, mask=there, other=0.0).to(tl.float32)
    hat = (tl.load(y + at, mask=there, other=0.0).to(tl.float32) - middle) * scale
    return grad, hat, grad * weights


@triton.jit
def layer_norm_terms_kernel(
    d_z, y, mean, rstd, weight, terms, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """``mean(g)`` and ``mean(g hat)`` of rows that no tile holds."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    middle, scale = tl.load(mean + row, mask=row < rows, other=0.0), tl.load(rstd + row, mask=row < rows, other=0.0)
    plain = tl.zeros([ROWS, COLS], tl.float32)
    along = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(0, D, COLS):
        column = first + tl.arange(0, COLS)[None, :]
        inside = column < D
        weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        _, hat, g = normed(d_z, y, row * D + column, middle, scale, weights, (row < rows) & inside)
        plain += g
        along += g * hat
    tl.store(terms + row, tl.sum(plain, 1, keep_dims=True) / D, mask=row < rows)
    tl.store(terms + rows + row, tl.sum(along, 1, keep_dims=True) / D, mask=row < rows)


@triton.jit
def folded(tile, SUMS: tl.constexpr):
    """A tile as it is added to ``SUMS`` rows of sums: its own number, or one."""
    if SUMS == 1:
        return tl.sum(tile, 0, keep_dims=True)
    else:
        return tile


@triton.jit
def layer_norm_backward_kernel(
    d_y, d_z, y, mean, rstd, weight, terms, d_x, d_branch, parts, rows, count, shares,
    D: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, KINDS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Every program has a block of columns and each ``shares``-th tile of rows; a block is a row, or there are ``terms``.

    Beyond the rows scale and gradients are zero, and with them all that is summed.
    """
    pid = tl.program_id(0)
    share = pid // BLOCKS
    column = pid % BLOCKS * COLS + tl.arange(0, COLS)[None, :]
    inside = column < D
    weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([SUMS, COLS], tl.float32)
    d_bias = tl.zeros([SUMS, COLS], tl.float32)
    d_stream = tl.zeros([SUMS, COLS], tl.float32)
    for i in tl.range(share, count, shares):
        row = tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & inside
        at = row * D + column
        middle = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        grad, hat, g = normed(d_z, y, at, middle, scale, weights, there)
        if terms is None:
            plain, along = tl.sum(g, 1, keep_dims=True) / D, tl.sum(g * hat, 1, keep_dims=True) / D
        else:
            plain = tl.load(terms + row, mask=row < rows, other=0.0)
            along = tl.load(terms + rows + row, mask=row < rows, other=0.0)
        stream = scale * (g - plain - hat * along)
        if d_y is not None:
            stream += tl.load(d_y + at, mask=there, other=0.0).to(tl.float32)
        tl.store(d_x + at, stream.to(d_x.dtype.element_ty), mask=there)
        if d_branch is not None:
            tl.store(d_branch + at, stream.to(d_branch.dtype.element_ty), mask=there)
        d_weight += folded(grad * hat, SUMS)
        d_bias += folded(grad, SUMS)
        if KINDS > 2:
            d_stream += folded(stream, SUMS)
    part = share.to(tl.int64) * (KINDS * D) + column
    tl.store(parts + part, tl.sum(d_weight, 0, keep_dims=True), mask=inside)
    tl.store(parts + D + part, tl.sum(d_bias, 0, keep_dims=True), mask=inside)
    if KINDS > 2:
        tl.store(parts + 2 * D + part, tl.sum(d_stream, 0, keep_dims=True), mask=inside)


def variant(configs: dict[int, Config], wide: Config, width: int) -> Config:
    """The configuration for rows of ``width``."""
    return next((config for widest, config in configs.items() if width <= widest), wide)


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Rows one after the other: what lies otherwise is copied."""
    return [None if t is None else t.contiguous() for t in tensors]


def forward_launches(x, branch, branch_bias, weight, bias, eps, out_dtype) -> tuple[Tensor, ...]:
    """``y``, ``z``, ``mean``, ``rstd`` and the launches that compute them."""
    y, z = x.new_empty((0,) if branch is None else x.shape), x.new_empty(x.shape, dtype=out_dtype)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    if x.numel() == 0:
        return y, z, mean.zero_(), rstd.zero_(), []
    rows, width = mean.numel(), x.shape[-1]
    config = variant(FORWARD, FORWARD_WIDE, width)
    tile = tiles(rows, width, config)
    inputs = ("x", "branch", "branch_bias", "weight", "bias")
    arguments = dict(zip(inputs, dense(x, branch, branch_bias, weight, bias)))
    arguments |= dict(y=None if branch is None else y, z=z, mean=mean, rstd=rstd, rows=rows, eps=eps)
    arguments |= dict(D=width, ROWS=tile.rows, COLS=tile.columns)
    return y, z, mean, rstd, [Launch(layer_norm_forward_kernel, tile.count, arguments, config)]


def backward_launches(d_y, d_z, y, mean, rstd, weight, branch_bias: bool) -> tuple[Tensor, ...]:
    """``d_x``, ``d_branch``, the gradients of the three vectors, and the launches that compute them."""
    d_x, d_branch = y.new_empty(y.shape), d_z.new_empty((0,) if d_z.dtype == y.dtype else d_z.shape)
    vectors = [weight.new_empty(weight.shape) for _ in range(2 + branch_bias)]
    results = (d_x, d_branch, *vectors, *([] if branch_bias else [weight.new_empty(0)]))
    if y.numel() == 0:
        for vector in vectors:
            vector.zero_()
        return *results, []
    rows, width = mean.numel(), y.shape[-1]
    config = variant(BACKWARD, BACKWARD_WIDE, width)
    tile = tiles(rows, width, config)
    shares = tile.shares(config, y.device)
    parts = y.new_empty(shares, len(vectors), width, dtype=torch.float32)
    inputs = ("d_y", "d_z", "y", "mean", "rstd", "weight")
    arguments = dict(zip(inputs, dense(d_y, d_z, y, mean, rstd, weight))) | dict(terms=None, rows=rows, D=width)
    launches = []
    if tile.blocks > 1:
        arguments["terms"] = y.new_empty(2, rows, dtype=torch.float32)
        height = dict(ROWS=1, COLS=FORWARD_WIDE.tokens)
        first = {name: arguments[name] for name in (*inputs[1:], "terms", "rows", "D")} | height
        launches.append(Launch(layer_norm_terms_kernel, rows, first, FORWARD_WIDE))
    arguments |= dict(d_x=d_x, d_branch=d_branch if d_branch.numel() else None, parts=parts, count=tile.count)
    arguments |= dict(shares=shares, BLOCKS=tile.blocks, ROWS=tile.rows, COLS=tile.columns, KINDS=len(vectors))
    # A thread has all rows of its columns where a warp is no wider than a row: then one sum a column is enough.
    arguments["SUMS"] = 1 if tile.columns >= 256 * config.warps else tile.rows
    launches.append(Launch(layer_norm_backward_kernel, tile.blocks * shares, arguments, config))
    launches.append(column_sums(parts, vectors))
    return *results, launches


def forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of the op ``layer_norm_forward``."""
    *results, launches = forward_launches(x, branch, branch_bias, weight, bias, eps, out_dtype)
    for launch in launches:
        launch.run()
    return tuple(results)


def backward(
    d_y: Tensor | None,
    d_z: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    branch_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Kernel of the op ``layer_norm_backward``."""
    *results, launches = backward_launches(d_y, d_z, y, mean, rstd, weight, branch_bias)
    for launch in launches:
        launch.run()
    return tuple(results)
