"""Describes the tokens of a grid for the kernels, once a call: raw channels times scale, laid out as they are read.

Scales are multiplied by log2(e), for logits in base 2. A token that is masked, or lies beyond the last column, is a
hole: its channels are 0, its scale is 1, and the logit gets a term, HOLE, that leaves no weight, whatever the query.
Columns are padded to a multiple of BLOCK, all holes.

    precision "fma"
        planes        [B, rows, F + 2, padded]   fp32: the channels, the scale, 0 or HOLE
    else
        scale         [B, rows, 2, padded]       fp32: the scale, 0 or HOLE
        keys          [B, rows, padded, K]       bf16, or fp32 for "ieee": [the channels, once for each piece of a
                                                 query | 0 | 1 in a hole, where there is room for it]
        values        [B, rows, padded, V]       bf16 for "bf16", else fp32: [scaled channels | 1 | eight columns, of
                                                 which that of row mod 8 holds the scale | 0]
    with dropout
        token_hashes  [rows, padded]             uint32 as int32

A product of weights and values thus sums channels, the weights themselves, and weights times scale of eight rows apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.dropout import hash_tokens, two_numbers
from perceiver_fast.kernels.grid import FEW, GROUP, Grid
from perceiver_fast.kernels.launch import Launch

HOLE = tl.constexpr(-(2.0**100))  # far below all logits, and finite: no difference with it is NaN
BLOCK = 64  # columns are padded to a multiple of it; no kernel's block is larger


@triton.jit
def token_block(scale, mask, columns, across, BLOCK: tl.constexpr):
    """A program's block of tokens: ``across`` programs share a row.

    Returns:
        row: int64, counted over all batch elements.
        j: ``[BLOCK]``, columns.
        token: int64 ``[BLOCK]``, indices into feat, scale and mask.
        there: bool ``[BLOCK]``, False for holes.
        r: ``[BLOCK]``, scales times log2(e); 1 for holes.
    """
    row = (tl.program_id(0) // across).to(tl.int64)
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    token = row * columns + j
    there = j < columns
    if mask is not None:
        there = there & (tl.load(mask + token, mask=there, other=0) != 0)
    r = tl.where(there, tl.load(scale + token, mask=there, other=0.0) * LOG2_E, 1.0)
    return row, j, token, there, r


@triton.jit
def grid_planes_kernel(
    feat, scale, mask, planes, columns, padded, across,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes for precision "fma": one for each channel, then log2(e) scale, and 0 or HOLE.

    Grid: ``B * rows * across`` programs of BLOCK tokens.

        feat    [B, rows, columns, F]       in   fp32, fp16 or bf16, dense
        scale   [B, rows, columns]          in   fp32, dense
        mask    [B, rows, columns]          in   uint8, dense, 0 for masked tokens; or None
        planes  [B, rows, F + 2, padded]    out  fp32, see above

        columns, padded, across  columns, columns in memory, and padded / BLOCK
    """
    row, j, token, there, r = token_block(scale, mask, columns, across, BLOCK)
    base = planes + row * (F + 2) * padded + j
    for f in tl.static_range(F):
        x = tl.load(feat + token * F + f, mask=there, other=0.0).to(tl.float32)
        tl.store(base + f * padded, x)
    tl.store(base + F * padded, r)
    tl.store(base + (F + 1) * padded, tl.where(there, 0.0, HOLE))


@triton.jit
def nearest_tf32(x):
    """x raised by half of TF32's last bit: tensor cores ignore the 13 bits behind it, and see the nearest TF32."""
    return tl.where(x == x, (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True), x)


@triton.jit
def grid_tokens_kernel(
    feat, scale, mask, keys, values, out_scale, rows, columns, padded, across,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys, values and scales for products, as the head of this file lays them out; scales times log2(e).

    Grid: ``B * rows * across`` programs of BLOCK tokens.

        feat       [B, rows, columns, F]  in   fp32, fp16 or bf16, dense
        scale      [B, rows, columns]     in   fp32, dense
        mask       [B, rows, columns]     in   uint8, dense, 0 for masked tokens; or None
        keys       [B, rows, padded, K]   out  bf16 or fp32, see above
        values     [B, rows, padded, V]   out  bf16 or fp32
        out_scale  [B, rows, 2, padded]   out  fp32

        rows, columns, padded, across  rows, columns, columns in memory, and padded / BLOCK
        F, K, V     channels, of a key and of a value
        GROUP       rows whose sums stand apart in a product with values
        PIECES      how often a channel stands in a key: :func:`key_pieces`
        SPLIT       pieces that a query is cut into; those of a key beyond them hold what bf16 leaves of a channel
    """
    row, j, token, there, r = token_block(scale, mask, columns, across, BLOCK)
    hole = tl.where(there, 0.0, 1.0)
    k = tl.arange(0, K)
    inside = there[:, None] & (k < PIECES * F)[None, :]
    x = tl.load(feat + token[:, None] * F + (k % F)[None, :], mask=inside, other=0.0).to(tl.float32)  # [BLOCK, K]
    at = row * padded + j
    if PIECES > 1:
        first = x.to(tl.bfloat16).to(tl.float32)
        x = tl.where((k // F < SPLIT)[None, :], first, x - first)
    if K > PIECES * F:
        x = tl.where((k == K - 1)[None, :], hole[:, None], x)
    tl.store(keys + at[:, None] * K + k[None, :], x.to(keys.dtype.element_ty))
    c = tl.arange(0, V)
    v = tl.load(feat + token[:, None] * F + c[None, :], mask=there[:, None] & (c < F)[None, :], other=0.0)
    v = v.to(tl.float32) * r[:, None]  # [BLOCK, V]
    v = tl.where((c == F)[None, :], 1.0, v)
    v = tl.where((c == F + 1 + (row % rows) % GROUP)[None, :], r[:, None], v)
    if PIECES > SPLIT:  # values in float32 for products in TF32
        v = nearest_tf32(v)
    tl.store(values + at[:, None] * V + c[None, :], v.to(values.dtype.element_ty))
    tl.store(out_scale + row * (2 * padded) + j, r)
    tl.store(out_scale + row * (2 * padded) + padded + j, hole * HOLE)


@triton.jit
def grid_attention_hashes_kernel(seed, token_hashes, columns, padded, across, BLOCK: tl.constexpr):
    """Dropout's hashes of the tokens, which all batch elements share. Beyond the last column they mean nothing.

    Grid: ``rows * across`` programs of BLOCK tokens.

        seed          [2]             in   int64: the seed, and the index of the first token
        token_hashes  [rows, padded]  out  uint32 as int32

        columns, padded, across  columns, columns in memory, and padded / BLOCK
    """
    row = (tl.program_id(0) // across).to(tl.int64)
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    token_hash = hash_tokens(tl.load(seed), tl.load(seed + 1) + row * columns + j)
    tl.store(token_hashes + row * padded + j, token_hash.to(tl.int32, bitcast=True))


@dataclass(frozen=True)
class TokenArrays:
    """What the kernels read of the tokens: planes, or scale, keys and values; shapes are above."""

    padded: int
    token_hashes: Tensor | None
    planes: Tensor | None = None
    scale: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


def key_pieces(grid: Grid) -> int:
    """How often a channel stands in a key: once for every piece of a query that it is to meet.

    Tensor cores multiply bf16. A query's float32 is cut into three pieces of it, or two if there are many channels. A
    bfloat16 channel is one piece. A float16 channel is two; the second, which is small, meets all of a query's pieces
    but the last. "ieee" multiplies float32, and a channel stands there once.
    """
    split = 3 if grid.features <= FEW else 2
    return {"bf16": split, "tf32": 2 * split - 1}.get(grid.precision, 1)


def key_width(grid: Grid) -> int:
    """K: columns of a key, at least the 16 that a product needs."""
    return max(16, triton.next_power_of_2(grid.features * key_pieces(grid)))


def has_room(grid: Grid) -> bool:
    """Whether a key's last column is free for its hole."""
    return grid.precision != "fma" and key_width(grid) > grid.features * key_pieces(grid)


def value_width(grid: Grid) -> int:
    """V: columns of a value: channels, one for the weights, and one for every row of a group."""
    return max(16, triton.next_power_of_2(grid.features + 1 + GROUP))


def describe_tokens(
    grid: Grid, feat: Tensor, scale: Tensor, mask: Tensor | None, seed: Tensor | None
) -> tuple[TokenArrays, list[Launch]]:
    """The arrays, and the launches that fill them.

    Args:
        feat: ``[B, *sizes, F]`` of float32, bfloat16 or float16, dense.
        scale: ``[B, *sizes]`` float32, dense.
        mask: uint8 ``[B, *sizes]``, dense, or None.
        seed: of dropout, or None.
    """
    few = grid.features <= FEW
    block = BLOCK if few else BLOCK // 4
    lines, padded = grid.batch * grid.rows, triton.cdiv(grid.columns, BLOCK) * BLOCK
    across = padded // block
    launches, token_hashes = [], None
    if seed is not None:
        token_hashes = scale.new_empty(grid.rows, padded, dtype=torch.int32)
        arguments = dict(
            seed=two_numbers(seed), token_hashes=token_hashes, columns=grid.columns, padded=padded, across=across
        )
        launches.append(Launch(grid_attention_hashes_kernel, grid.rows * across, arguments | dict(BLOCK=block)))
    common = dict(feat=feat, scale=scale, mask=mask, columns=grid.columns, padded=padded, across=across)
    common |= dict(F=grid.features, BLOCK=block)
    if grid.precision == "fma":
        planes = scale.new_empty(lines, grid.features + 2, padded)
        launches.append(Launch(grid_planes_kernel, lines * across, common | dict(planes=planes)))
        return TokenArrays(padded, token_hashes, planes=planes), launches
    pieces, values_dtype = key_pieces(grid), torch.bfloat16 if grid.precision == "bf16" else torch.float32
    keys = scale.new_empty(lines, padded, key_width(grid), dtype=torch.bfloat16 if pieces > 1 else torch.float32)
    values = scale.new_empty(lines, padded, value_width(grid), dtype=values_dtype)
    scaled = scale.new_empty(lines, 2, padded)
    common |= dict(keys=keys, values=values, out_scale=scaled, rows=grid.rows, K=key_width(grid), V=value_width(grid))
    common |= dict(GROUP=GROUP, PIECES=pieces, SPLIT=3 if few else 2)
    launches.append(Launch(grid_tokens_kernel, lines * across, common))
    return TokenArrays(padded, token_hashes, None, scaled, keys, values), launches
