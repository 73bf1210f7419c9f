"""LayerNorm of a residual stream with the branch that joins it, forward and backward, each in one pass over memory.

    y = x + (branch + branch_bias),    hat = (y - mean) rstd,    z = hat weight + bias
    g = d_z weight,    d_x = d_y + rstd (g - mean(g) - hat mean(g hat))

Rows up to ``ONE_BLOCK`` wide are held in registers; wider ones are walked over in blocks of columns, three times in the
forward. The variance is that of the centred row, in two passes. y is rounded to the dtype of x before its statistics
are taken: they are those of what the backward reads. Kernels take matrices ``[rows, D]``, dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.checks import HALF_OR_FLOAT, Check
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.kernels.row_tiles import column_sums, tiles

CHECK = Check("layer_norm")
ONE_BLOCK = 4096
# By the widest row that takes it. Narrow rows stay within a warp, whose sums need no barrier.
FORWARD = {
    1024: Config(queries=1, tokens=1024, warps=1, registers=168),
    2048: Config(queries=1, tokens=2048, warps=4, registers=64),
    ONE_BLOCK: Config(queries=1, tokens=4096, warps=8, registers=64),
}
FORWARD_WIDE = Config(queries=1, tokens=2048, warps=8, registers=128)  # of rows beyond ONE_BLOCK
# Every program leaves its sums of 2 or 3 gradients, a number a column, to be added up. So there are few programs, as
# many as registers hold at a time, and each takes many rows.
BACKWARD = {
    512: Config(queries=2, tokens=512, warps=1, registers=255),
    2048: Config(queries=1, tokens=2048, warps=4, registers=168),
    ONE_BLOCK: Config(queries=1, tokens=4096, warps=8, registers=255),
}
BACKWARD_WIDE = Config(queries=2, tokens=1024, warps=4, registers=128)


@triton.jit
def tile_at(first, row, rows, D: tl.constexpr, COLS: tl.constexpr):
    """A tile from column ``first``, of rows ``row [ROWS, 1]``.

    Returns:
        column: ``[1, COLS]``.
        inside: bool ``[1, COLS]``, the column is one of D.
        there: bool ``[ROWS, COLS]``, and the row is one of ``rows``: else entries read as zero and are not written.
        at: int64 ``[ROWS, COLS]``, indices into a matrix ``[rows, D]``.
    """
    column = first + tl.arange(0, COLS)[None, :]
    inside = column < D
    there = (row < rows) & inside
    at = row * D + column
    return column, inside, there, at


@triton.jit
def joined(x, branch, branch_bias, at, column, there, inside):
    """The stream joined by its branch, at a tile of :func:`tile_at`: float32, rounded to the stream's dtype."""
    stream = tl.load(x + at, mask=there, other=0.0)
    if branch is not None:
        added = tl.load(branch + at, mask=there, other=0.0).to(tl.float32)
        if branch_bias is not None:
            added += tl.load(branch_bias + column, mask=inside, other=0.0).to(tl.float32)
        stream = (stream.to(tl.float32) + added).to(x.dtype.element_ty)
    return stream.to(tl.float32)


@triton.jit
def store_normed(z, values, weight, bias, at, column, there, inside):
    """Writes ``values weight + bias`` to a tile of z, in its dtype."""
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + at, (values * w + b).to(z.dtype.element_ty), mask=there)


@triton.jit
def corrections(sums, squares, eps, D: tl.constexpr):
    """What a row's mean is wrong by, and ``rstd``, from the sums of the row centred by that mean and of its squares.

    A mean that is large beside the deviations is rounded by something that is not small beside them.
    """
    off = sums / D
    return off, tl.math.rsqrt(tl.maximum(squares / D - off * off, 0.0) + eps)


@triton.jit
def layer_norm_forward_kernel(
    x, branch, branch_bias, weight, bias, y, z, mean, rstd, rows, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``y = x + (branch + branch_bias)``, ``z = (y - mean) rstd weight + bias`` of ROWS rows.

    Grid: a program for ROWS rows; rows beyond the last read as zeros and are not written.

        x            [rows, D]  in   the stream: fp32, fp16 or bf16
        branch       [rows, D]  in   fp32, fp16 or bf16; or None
        branch_bias  [D]        in   likewise; or None
        weight       [D]        in   fp32, fp16 or bf16
        bias         [D]        in   likewise
        y            [rows, D]  out  dtype of x; None without a branch, where y is x
        z            [rows, D]  out  fp32, fp16 or bf16
        mean, rstd   [rows]     out  fp32

        rows, eps   number of rows, and what is added to the variance
        ROWS, COLS  tile; rows of D <= COLS are held, wider ones walked over
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    if D <= COLS:
        column, inside, there, at = tile_at(0, row, rows, D, COLS)
        values = joined(x, branch, branch_bias, at, column, there, inside)
        if branch is not None:
            tl.store(y + at, values.to(y.dtype.element_ty), mask=there)
        middle = tl.sum(values, 1, keep_dims=True) / D
        centred = tl.where(inside, values - middle, 0.0)
        sums, squares = tl.sum(centred, 1, keep_dims=True), tl.sum(centred * centred, 1, keep_dims=True)
        off, scale = corrections(sums, squares, eps, D)
        store_normed(z, (centred - off) * scale, weight, bias, at, column, there, inside)
    else:  # y is made three times, of inputs that are still cached: without a barrier threads miss what others wrote
        sums = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.range(0, D, COLS):
            column, inside, there, at = tile_at(first, row, rows, D, COLS)
            values = joined(x, branch, branch_bias, at, column, there, inside)
            if branch is not None:
                tl.store(y + at, values.to(y.dtype.element_ty), mask=there)
            sums += values
        middle = tl.sum(sums, 1, keep_dims=True) / D
        sums = tl.zeros([ROWS, COLS], tl.float32)
        squares = tl.zeros([ROWS, COLS], tl.float32)
        for first in tl.range(0, D, COLS):
            column, inside, there, at = tile_at(first, row, rows, D, COLS)
            values = joined(x, branch, branch_bias, at, column, there, inside)
            centred = tl.where(inside, values - middle, 0.0)
            sums += centred
            squares += centred * centred
        off, scale = corrections(tl.sum(sums, 1, keep_dims=True), tl.sum(squares, 1, keep_dims=True), eps, D)
        for first in tl.range(0, D, COLS):
            column, inside, there, at = tile_at(first, row, rows, D, COLS)
            values = joined(x, branch, branch_bias, at, column, there, inside)
            store_normed(z, (values - middle - off) * scale, weight, bias, at, column, there, inside)
    tl.store(mean + row, middle + off, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit
def normed(d_z, y, at, middle, scale, weights, there):
    """``d_z``, ``hat`` and ``g`` at a tile ``[ROWS, COLS]``; all zero where nothing is ``there``, but hat.

    hat is off by what the row's mean was rounded by as it was stored, times ``scale``: its own mean over the row.
    """
    grad = tl.load(d_z + at, mask=there, other=0.0).to(tl.float32)
    hat = (tl.load(y + at, mask=there, other=0.0).to(tl.float32) - middle) * scale
    return grad, hat, grad * weights


@triton.jit
def layer_norm_terms_kernel(
    d_z, y, mean, rstd, weight, terms, rows, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """``mean(g)``, ``mean(g hat)`` and what the means of rows that are wider than a tile were rounded by, times rstd.

    Grid: a program for ROWS rows; rows beyond the last read as zeros and are not written.

        d_z         [rows, D]  in   fp32, fp16 or bf16
        y           [rows, D]  in   fp32, fp16 or bf16
        mean, rstd  [rows]     in   fp32
        weight      [D]        in   fp32, fp16 or bf16
        terms       [3, rows]  out  fp32

        rows        number of rows
        ROWS, COLS  tile, at a time
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    middle, scale = tl.load(mean + row, mask=row < rows, other=0.0), tl.load(rstd + row, mask=row < rows, other=0.0)
    plain = tl.zeros([ROWS, COLS], tl.float32)
    along = tl.zeros([ROWS, COLS], tl.float32)
    rest = tl.zeros([ROWS, COLS], tl.float32)
    for first in tl.range(0, D, COLS):
        column, inside, there, at = tile_at(first, row, rows, D, COLS)
        weights = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        _, hat, g = normed(d_z, y, at, middle, scale, weights, there)
        plain += g
        along += g * hat
        rest += tl.where(there, hat, 0.0)
    off, g_mean = tl.sum(rest, 1, keep_dims=True) / D, tl.sum(plain, 1, keep_dims=True) / D
    tl.store(terms + row, g_mean, mask=row < rows)
    tl.store(terms + rows + row, tl.sum(along, 1, keep_dims=True) / D - off * g_mean, mask=row < rows)
    tl.store(terms + 2 * rows + row, off, mask=row < rows)


@triton.jit
def folded(tile, SUMS: tl.constexpr):
    """A tile ``[ROWS, COLS]`` as it is added to ``[SUMS, COLS]``: as it is, or summed over its rows if SUMS is 1."""
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
    """``d_x = d_y + rstd (g - mean(g) - hat mean(g hat))``, and a share's sums over rows for the gradients of vectors.

    Grid: ``BLOCKS * shares`` programs. One has a block of COLS columns and every ``shares``-th tile of rows. A block is
    a whole row, or a row's means come as ``terms``. Rows beyond the last read as zeros, rstd too, and add nothing to
    sums.

        d_y         [rows, D]           in   dtype of y; or None
        d_z         [rows, D]           in   fp32, fp16 or bf16
        y           [rows, D]           in   fp32, fp16 or bf16
        mean, rstd  [rows]              in   fp32
        weight      [D]                 in   fp32, fp16 or bf16
        terms       [3, rows]           in   fp32, of layer_norm_terms_kernel; or None
        d_x         [rows, D]           out  dtype of y
        d_branch    [rows, D]           out  dtype of d_z; None where that is y's, and d_x serves for both
        parts       [shares, KINDS, D]  out  fp32: sums of the gradients of weight, bias and, of 3 kinds, branch_bias

        rows, count, shares  number of rows, of tiles of ROWS rows, and of programs that share them
        BLOCKS               of COLS columns
        ROWS, COLS           tile
        SUMS                 rows of sums that are kept until the end: ROWS, or 1
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
            hat -= tl.sum(tl.where(there, hat, 0.0), 1, keep_dims=True) / D
            plain, along = tl.sum(g, 1, keep_dims=True) / D, tl.sum(g * hat, 1, keep_dims=True) / D
        else:
            plain = tl.load(terms + row, mask=row < rows, other=0.0)
            along = tl.load(terms + rows + row, mask=row < rows, other=0.0)
            hat -= tl.load(terms + 2 * rows + row, mask=row < rows, other=0.0)
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
    """The configuration for rows of ``width``: the first of ``configs`` that is wide enough, or ``wide``."""
    return next((config for widest, config in configs.items() if width <= widest), wide)


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors whose rows follow each other without gaps: the same ones, or copies."""
    return [None if t is None else t.contiguous() for t in tensors]


def forward_launches(x, branch, branch_bias, weight, bias, eps, out_dtype) -> tuple[Tensor, ...]:
    """``y``, ``z``, ``mean``, ``rstd`` and the launches that compute them; see :func:`forward`."""
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
    """``d_x``, ``d_branch``, three vectors' gradients, and the launches that compute them; see :func:`backward`."""
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
        arguments["terms"] = y.new_empty(3, rows, dtype=torch.float32)
        height = dict(ROWS=1, COLS=FORWARD_WIDE.tokens)
        first = {name: arguments[name] for name in (*inputs[1:], "terms", "rows", "D")} | height
        launches.append(Launch(layer_norm_terms_kernel, rows, first, FORWARD_WIDE))
    arguments |= dict(d_x=d_x, d_branch=d_branch if d_branch.numel() else None, parts=parts, count=tile.count)
    arguments |= dict(shares=shares, BLOCKS=tile.blocks, ROWS=tile.rows, COLS=tile.columns, KINDS=len(vectors))
    # Where a row is as wide as all warps together, a thread has all rows of its columns: one sum a column is enough.
    arguments["SUMS"] = 1 if tile.columns >= 256 * config.warps else tile.rows
    launches.append(Launch(layer_norm_backward_kernel, tile.blocks * shares, arguments, config))
    launches.append(column_sums(parts, vectors))
    return *results, launches


def check(name: str, x: Tensor, out_dtype: torch.dtype, **vectors: Tensor | None) -> None:
    """Raises RuntimeError unless the stream, the dtype of z, and vectors of a number a column are what kernels take."""
    CHECK.dtype(name, x, *HALF_OR_FLOAT)
    CHECK.expect(x.dim() > 0, f"{name} of at least one dimension", "a scalar")
    allowed = HALF_OR_FLOAT if x.dtype == torch.float32 else (x.dtype,)
    CHECK.expect(out_dtype in allowed, f"z in {x.dtype}, or half precision beside float32", out_dtype)
    for vector, t in vectors.items():
        CHECK.tensor(vector, t, x.dtype, x.shape[-1:], "[D]")


def forward(
    x: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of the operator ``layer_norm_forward``.

    Args:
        x: ``[.., D]`` float32, bfloat16 or float16, the stream.
        branch: ``[.., D]``, what joins the stream, or None.
        branch_bias: ``[D]``, added to branch, or None.
        weight, bias: ``[D]``.
        eps: added to the variance.
        out_dtype: of z.

    Returns:
        y ``[.., D]`` in the dtype of x (empty without a branch), z ``[.., D]``, and mean and rstd ``[..]`` float32.
    """
    check("x", x, out_dtype, branch_bias=branch_bias, weight=weight, bias=bias)
    CHECK.eps(eps)
    CHECK.expect(branch is not None or branch_bias is None, "branch_bias with a branch", "it alone")
    CHECK.tensor("branch", branch, out_dtype, x.shape, "like x")
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
    """Kernel of the operator ``layer_norm_backward``.

    Args:
        d_y: ``[.., D]``, the gradient of y in its dtype, or None.
        d_z: ``[.., D]``.
        y: ``[.., D]``, the joined stream.
        mean, rstd: ``[..]`` float32, of the forward.
        weight: ``[D]``.
        branch_bias: whether its gradient is asked for.

    Returns:
        Gradients of x, branch (empty where it is that of x), weight, bias, and branch_bias (empty if not asked for).
    """
    check("y", y, d_z.dtype, weight=weight)
    CHECK.shape("d_z", d_z, y.shape, "like y")
    CHECK.tensor("d_y", d_y, y.dtype, y.shape, "like y")
    for name, t in (("mean", mean), ("rstd", rstd)):
        CHECK.tensor(name, t, torch.float32, y.shape[:-1], "of y's rows")
    *results, launches = backward_launches(d_y, d_z, y, mean, rstd, weight, branch_bias)
    for launch in launches:
        launch.run()
    return tuple(results)
