"""Describes the tokens of a grid for the kernels, once a call: raw channels times scale, laid out as they are read.

Scales are multiplied by log2(e), for logits in base 2. A token that is masked, or lies beyond the last column, is a hole:
its channels are 0, its scale 1, and what its hole adds to a logit leaves no weight, whatever the query.

    fma    planes [B, rows, F + 2, columns]      float32: the channels, the scale, the hole
    else   scale  [B, rows, 2, columns]          float32: the scale, the hole
           keys   [B, rows, columns, K]          [channels in bf16, once for each of a query's pieces | 0 | hole], the hole
                                                 where there is room for it
           values [B, rows, columns, V]          [scaled channels | one | scale at row mod 8 | 0]: the last eight are what
                                                 makes a product of weights and values sum eight rows apart
    with dropout also the tokens' 32-bit keys [rows, columns]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.dropout import hash_tokens
from perceiver_fast.kernels.grid import FEW, GROUP, Grid
from perceiver_fast.kernels.launch import Launch

HOLE = tl.constexpr(-(2.0**100))
BLOCK = 64  # columns are padded to a multiple of it; no kernel's block is larger


@triton.jit
def grid_planes_kernel(
    feat, scale, mask, planes, columns, padded, across,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // across).to(tl.int64)  # of all batch elements
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    token = row * columns + j
    there = j < columns
    if mask is not None:
        there = there & (tl.load(mask + token, mask=there, other=0) != 0)
    r = tl.where(there, tl.load(scale + token, mask=there, other=0.0) * LOG2_E, 1.0)
    base = planes + row * (F + 2) * padded + j
    for f in tl.static_range(F):
        x = tl.load(feat + token * F + f, mask=there, other=0.0).to(tl.float32)
        tl.store(base + f * padded, x)
    tl.store(base + F * padded, r)
    tl.store(base + (F + 1) * padded, tl.where(there, 0.0, HOLE))


@triton.jit
def nearest_tf32(x):
    """x, such that what is left of it when tensor cores ignore its last 13 bits is the nearest TF32."""
    return tl.where(x == x, (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True), x)


@triton.jit
def grid_tokens_kernel(
    feat, scale, mask, keys, values, out_scale, rows, columns, padded, across,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    PIECES: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // across).to(tl.int64)
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    token = row * columns + j
    there = j < columns
    if mask is not None:
        there = there & (tl.load(mask + token, mask=there, other=0) != 0)
    r = tl.where(there, tl.load(scale + token, mask=there, other=0.0) * LOG2_E, 1.0)
    hole = tl.where(there, 0.0, 1.0)
    k = tl.arange(0, K)
    inside = there[:, None] & (k < PIECES * F)[None, :]
    x = tl.load(feat + token[:, None] * F + (k % F)[None, :], mask=inside, other=0.0).to(tl.float32)
    at = row * padded + j
    if PIECES > 1:
        first = x.to(tl.bfloat16).to(tl.float32)
        x = tl.where((k // F < SPLIT)[None, :], first, x - first)
    if K > PIECES * F:
        x = tl.where((k == K - 1)[None, :], hole[:, None], x)
    tl.store(keys + at[:, None] * K + k[None, :], x.to(keys.dtype.element_ty))
    c = tl.arange(0, V)
    v = tl.load(feat + token[:, None] * F + c[None, :], mask=there[:, None] & (c < F)[None, :], other=0.0)
    v = v.to(tl.float32) * r[:, None]
    v = tl.where((c == F)[None, :], 1.0, v)
    v = tl.where((c == F + 1 + (row % rows) % GROUP)[None, :], r[:, None], v)
    if PIECES > SPLIT:  # values in float32 for products in TF32
        v = nearest_tf32(v)
    tl.store(values + at[:, None] * V + c[None, :], v.to(values.dtype.element_ty))
    tl.store(out_scale + row * (2 * padded) + j, r)
    tl.store(out_scale + row * (2 * padded) + padded + j, hole * HOLE)


@triton.jit
def grid_attention_hashes_kernel(seed, token_hashes, columns, padded, across, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // across).to(tl.int64)
    j = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    key = hash_tokens(tl.load(seed), row * columns + j)
    tl.store(token_hashes + row * padded + j, key.to(tl.int32, bitcast=True))


@dataclass(frozen=True)
class TokenArrays:
    """What the kernels read of the tokens; planes, or scale, keys and values."""

    padded: int
    token_hashes: Tensor | None
    planes: Tensor | None = None
    scale: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


def key_pieces(grid: Grid) -> int:
    """How often a channel stands in a key.

    Tensor cores multiply bf16. A query's float32 is three pieces of it (of many channels two), a bf16 channel one, a
    float16 channel two, whose second meets all of a query's pieces but the last. "ieee" is float32.
    """
    split = 3 if grid.features <= FEW else 2
    return {"bf16": split, "tf32": 2 * split - 1}.get(grid.precision, 1)


def key_width(grid: Grid) -> int:
    """K: channels of a key, padded to what a product needs."""
    return max(16, triton.next_power_of_2(grid.features * key_pieces(grid)))


def has_room(grid: Grid) -> bool:
    """Whether a key's last column is free for its hole."""
    return grid.precision != "fma" and key_width(grid) > grid.features * key_pieces(grid)


def value_width(grid: Grid) -> int:
    """V: channels, one, and a column for every row of a group."""
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
        arguments = dict(seed=seed, token_hashes=token_hashes, columns=grid.columns, padded=padded, across=across)
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
