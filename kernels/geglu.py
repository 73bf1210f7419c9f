"""GEGLU in one pass over memory, and its backward in one, which makes the result again and sums the bias's gradient.

    [value, gate] = h + bias,    u = value gate Phi(gate)
    d_value = d_u gate Phi(gate),    d_gate = d_u value (Phi(gate) + gate phi(gate))

Memory is what a GPU waits for as long as an element takes no more than about 30 instructions, and CUDA's erf alone
takes 28. Phi is therefore one exponential whose exponent is a polynomial: 13 instructions. Below zero it is more exact
than by way of erf, since no difference of nearly equal numbers is taken.
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

CHECK = Check("geglu")
FORWARD = Config(queries=2, tokens=1024, warps=4)
BACKWARD = Config(queries=1, tokens=1024, warps=4, registers=96)


@triton.jit
def cumulative(x):
    """The normal distribution's Phi, of any shape, to 6e-8: 2^(-1 + x p(x)) is Phi(-x) for x >= 0.

    Of all polynomials of degree 7, p is the one whose largest error in Phi over 0 .. 6.5 is least, 8e-9. Beyond 6.5 the
    error only falls.
    """
    a = tl.abs(x)
    bits = a * -2.8349131753202528e-06 + 3.937769361073151e-05
    bits = bits * a - 0.00018618024478200823
    bits = bits * a - 0.00013693634537048638
    bits = bits * a + 0.00706342002376914
    bits = bits * a - 0.052496179938316345
    bits = bits * a - 0.4592081904411316
    bits = bits * a - 1.1511051654815674
    tail = tl.math.exp2(bits * a - 1.0)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def density(x):
    """The normal distribution's phi: 2^(-x^2 log2(e) / 2 - log2(2 pi) / 2)."""
    return tl.math.exp2(x * x * -0.7213475204444817 - 1.3257480647361593)


@triton.jit
def biases(bias, column, F: tl.constexpr):
    """Biases of values and of gates at ``column [1, COLS]``, float32: 0 beyond F, and the number 0.0 without a bias."""
    if bias is None:
        return 0.0, 0.0
    else:
        inside = column < F
        value, gate = tl.load(bias + column, mask=inside, other=0.0), tl.load(bias + F + column, mask=inside, other=0.0)
        return value.to(tl.float32), gate.to(tl.float32)


@triton.jit
def geglu_forward_kernel(
    h, bias, u, rows, F: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """``[value, gate] = h + bias``, ``u = value gate Phi(gate)`` of a tile.

    Grid: a program for ROWS rows and COLS columns, columns first. What lies beyond reads as zero and is not written.

        h     [rows, 2 F]  in   fp32, fp16 or bf16, dense
        bias  [2 F]        in   fp32, fp16 or bf16; or None
        u     [rows, F]    out  dtype of h, dense

        rows        number of rows
        BLOCKS      of COLS columns
        ROWS, COLS  tile
    """
    pid = tl.program_id(0)
    column = pid % BLOCKS * COLS + tl.arange(0, COLS)[None, :]
    row = (pid // BLOCKS).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    there = (row < rows) & (column < F)
    at = row * (2 * F) + column
    value, gate = tl.load(h + at, mask=there, other=0.0), tl.load(h + F + at, mask=there, other=0.0)
    value_bias, gate_bias = biases(bias, column, F)
    value, gate = value.to(tl.float32) + value_bias, gate.to(tl.float32) + gate_bias
    tl.store(u + row * F + column, (value * (gate * cumulative(gate))).to(u.dtype.element_ty), mask=there)


@triton.jit
def geglu_backward_kernel(
    d_u, h, bias, u, d_h, parts, rows, count, shares,
    F: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """u again, ``d_h = [d_value, d_gate]``, and a share's sums of it over rows, for the gradient of the bias.

        d_value = d_u gate Phi(gate),    d_gate = d_u value (Phi(gate) + gate phi(gate))

    Grid: ``BLOCKS * shares`` programs. One has a block of COLS columns and every ``shares``-th tile of rows; entries
    beyond the last row or column read as zero, are not written and add nothing to sums.

        d_u    [rows, F]         in   dtype of h, dense
        h      [rows, 2 F]       in   fp32, fp16 or bf16, dense
        bias   [2 F]             in   fp32, fp16 or bf16; or None
        u      [rows, F]         out  dtype of h, dense
        d_h    [rows, 2 F]       out  dtype of h, dense
        parts  [shares, 1, 2 F]  out  fp32; None without a bias

        rows, count, shares  number of rows, of tiles of ROWS rows, and of programs that share them
        BLOCKS               of COLS columns
        ROWS, COLS           tile
    """
    pid = tl.program_id(0)
    share = pid // BLOCKS
    column = pid % BLOCKS * COLS + tl.arange(0, COLS)[None, :]
    value_bias, gate_bias = biases(bias, column, F)
    value_sums = tl.zeros([ROWS, COLS], tl.float32)
    gate_sums = tl.zeros([ROWS, COLS], tl.float32)
    for i in tl.range(share, count, shares):
        row = tl.cast(i, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < F)
        narrow, wide = row * F + column, row * (2 * F) + column
        value, gate = tl.load(h + wide, mask=there, other=0.0), tl.load(h + F + wide, mask=there, other=0.0)
        grad = tl.load(d_u + narrow, mask=there, other=0.0).to(tl.float32)
        value, gate = value.to(tl.float32) + value_bias, gate.to(tl.float32) + gate_bias
        phi = cumulative(gate)
        gelu = gate * phi
        d_value = grad * gelu
        d_gate = grad * value * (gate * density(gate) + phi)
        tl.store(u + narrow, (value * gelu).to(u.dtype.element_ty), mask=there)
        tl.store(d_h + wide, d_value.to(d_h.dtype.element_ty), mask=there)
        tl.store(d_h + F + wide, d_gate.to(d_h.dtype.element_ty), mask=there)
        if parts is not None:
            value_sums += d_value
            gate_sums += d_gate
    if parts is not None:
        at = share.to(tl.int64) * (2 * F) + column
        tl.store(parts + at, tl.sum(value_sums, 0, keep_dims=True), mask=column < F)
        tl.store(parts + F + at, tl.sum(gate_sums, 0, keep_dims=True), mask=column < F)


def forward_launches(h: Tensor, bias: Tensor | None) -> tuple[Tensor, list[Launch]]:
    """``u [.., F]`` and the launches that compute it."""
    width = h.shape[-1] // 2
    u = h.new_empty(*h.shape[:-1], width)
    if u.numel() == 0:
        return u, []
    rows = u.numel() // width
    tile = tiles(rows, width, FORWARD)
    arguments = dict(h=h.contiguous(), bias=None if bias is None else bias.contiguous(), u=u, rows=rows)
    arguments |= dict(F=width, BLOCKS=tile.blocks, ROWS=tile.rows, COLS=tile.columns)
    return u, [Launch(geglu_forward_kernel, tile.blocks * tile.count, arguments, FORWARD)]


def backward_launches(d_u: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:
    """``u``, ``d_h``, ``d_bias`` and the launches that compute them; see :func:`backward`."""
    u, d_h = h.new_empty(d_u.shape), h.new_empty(h.shape)
    d_bias = h.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    if u.numel() == 0:
        return u, d_h, d_bias.zero_(), []
    width = u.shape[-1]
    rows = u.numel() // width
    tile = tiles(rows, width, BACKWARD)
    shares = tile.shares(BACKWARD, h.device)
    parts = None if bias is None else h.new_empty(shares, 1, 2 * width, dtype=torch.float32)
    arguments = dict(d_u=d_u.contiguous(), h=h.contiguous(), bias=None if bias is None else bias.contiguous())
    arguments |= dict(u=u, d_h=d_h, parts=parts, rows=rows, count=tile.count, shares=shares)
    arguments |= dict(F=width, BLOCKS=tile.blocks, ROWS=tile.rows, COLS=tile.columns)
    launches = [Launch(geglu_backward_kernel, tile.blocks * shares, arguments, BACKWARD)]
    launches += [] if bias is None else [column_sums(parts, [d_bias])]
    return u, d_h, d_bias, launches


def check(h: Tensor, bias: Tensor | None) -> None:
    """Raises RuntimeError for what these kernels cannot take: another dtype, rank or size."""
    CHECK.dtype("h", h, *HALF_OR_FLOAT)
    CHECK.expect(h.dim() > 0 and h.shape[-1] % 2 == 0, "h [.., 2 F]", f"shape {list(h.shape)}")
    CHECK.dtype("bias", bias, h.dtype, torch.float32)
    CHECK.shape("bias", bias, h.shape[-1:], "[2 F]")


def forward(h: Tensor, bias: Tensor | None) -> Tensor:
    """Kernel of the operator ``geglu_forward``: u ``[.., F]`` of h ``[.., 2 F]``, the same dtype, and bias ``[2 F]``."""
    check(h, bias)
    u, launches = forward_launches(h, bias)
    for launch in launches:
        launch.run()
    return u


def backward(d_u: Tensor, h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the operator ``geglu_backward``: from d_u ``[.., F]`` and the forward's arguments.

    Returns:
        u ``[.., F]`` again, d_h ``[.., 2 F]``, d_bias ``[2 F]`` in the dtype of bias (empty without one).
    """
    check(h, bias)
    CHECK.tensor("d_u", d_u, h.dtype, (*h.shape[:-1], h.shape[-1] // 2), "[.., F]")
    *results, launches = backward_launches(d_u, h, bias)
    for launch in launches:
        launch.run()
    return tuple(results)
