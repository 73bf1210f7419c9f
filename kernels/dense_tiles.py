"""Matrices of any number of channels, in chunks: what the kernels of cross_attention share.

A program owns a tile of A rows of one matrix (queries, or tokens) and walks over tiles of B rows of another (tokens, or
queries). Matrices lie in memory as ``[rows, channels]``, channels dense. Two products are needed: ``a b^T [A, B]``,
summed over all channels (:func:`product`), and a tile of weights ``[A, B]`` times ``b``, whose sums stay in registers,
one tensor ``[A, CHUNK]`` a chunk of channels (:func:`accumulate`). Chunks are powers of two as Triton wants them; the
last is as narrow as what is left allows, so that 261 channels cost 272 and not 512.

Functions take a matrix as a pointer to its first element of interest, the stride between rows, and how many rows and
channels there are from there on. What lies beyond reads as zero and is not written. ``ALL_..`` says that nothing does.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Pieces:
    """How channels are cut: ``count`` chunks of ``chunk`` and one of ``tail`` (or 0), times ``groups``.

    Each group is the work of programs of its own, since a thread has no registers for the sums of more. Kernels take
    the first three as CHUNK, COUNT and TAIL, with a prefix where there are several.
    """

    chunk: int
    count: int
    tail: int
    groups: int = 1


def cut(channels: int, chunk: int, most: int | None = None) -> Pieces:
    """``channels`` in chunks, by groups of at most ``most`` of them (a multiple of the chunk, beside a tail of 16)."""
    if most is not None and channels > most + 16:
        chunks = triton.cdiv(channels, chunk)
        groups = triton.cdiv(chunks, most // chunk)
        return Pieces(chunk, triton.cdiv(chunks, groups), 0, groups)
    left = channels % chunk
    return Pieces(chunk, channels // chunk, max(16, triton.next_power_of_2(left)) if left else 0)


@triton.jit
def place(program, blocks, splits, GROUPS: tl.constexpr):
    """A program's block of rows, group of channels, split of the walk, and head ``b H + h``.

    Blocks follow each other first, then groups, splits and heads: neighbouring programs read the same tiles.
    """
    block = program % blocks
    group = program // blocks % GROUPS
    split = program // (blocks * GROUPS) % splits
    head = program // (blocks * GROUPS) // splits
    return block, group, split, head


@triton.jit
def load(
    base, stride, rows, channel, channels,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ALL_ROWS: tl.constexpr, ALL_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, WIDTH]`` from row 0 and ``channel`` of a ``[rows, channels]`` matrix at ``base``; zero beyond it."""
    row, column = tl.arange(0, ROWS)[:, None], channel + tl.arange(0, WIDTH)[None, :]
    at = base + row * stride + column
    if ALL_ROWS and ALL_CHANNELS:
        return tl.load(at)
    elif ALL_ROWS:
        return tl.load(at, mask=column < channels, other=0.0)
    elif ALL_CHANNELS:
        return tl.load(at, mask=row < rows, other=0.0)
    else:
        return tl.load(at, mask=(row < rows) & (column < channels), other=0.0)


@triton.jit
def hold(
    base, stride, rows,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    HOLD: tl.constexpr,
):  # fmt: skip
    """All chunks of a tile of ROWS rows, for :func:`product`: COUNT of ``[ROWS, CHUNK]``, one ``[ROWS, TAIL]``.

    None without HOLD: the tile is to be read again.
    """
    held = ()
    if HOLD:
        for i in tl.static_range(COUNT):
            held = held + (load(base, stride, rows, i * CHUNK, CHANNELS, ROWS, CHUNK, False, True),)
        if TAIL:
            held = held + (load(base, stride, rows, COUNT * CHUNK, CHANNELS, ROWS, TAIL, False, False),)
    return held


@triton.jit
def product(
    a, a_stride, a_rows, held, b, b_stride, b_rows,
    A: tl.constexpr, B: tl.constexpr, CHANNELS: tl.constexpr,
    CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    HOLD: tl.constexpr, ALL_B: tl.constexpr,
):  # fmt: skip
    """``a b^T [A, B]`` in fp32, summed over CHANNELS.

    ``held`` are the chunks of a, which fit into registers if HOLD; else they are read again, from the cache mostly.
    ALL_B: b has B rows or more.
    """
    total = tl.zeros([A, B], tl.float32)
    if HOLD:
        for i in tl.static_range(COUNT):
            y = load(b, b_stride, b_rows, i * CHUNK, CHANNELS, B, CHUNK, ALL_B, True)
            total = tl.dot(held[i], tl.trans(y), total, input_precision="ieee")
        if TAIL:
            y = load(b, b_stride, b_rows, COUNT * CHUNK, CHANNELS, B, TAIL, ALL_B, False)
            total = tl.dot(held[COUNT], tl.trans(y), total, input_precision="ieee")
    else:
        for channel in tl.range(0, COUNT * CHUNK, CHUNK):
            x = load(a, a_stride, a_rows, channel, CHANNELS, A, CHUNK, False, True)
            y = load(b, b_stride, b_rows, channel, CHANNELS, B, CHUNK, ALL_B, True)
            total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        if TAIL:
            x = load(a, a_stride, a_rows, COUNT * CHUNK, CHANNELS, A, TAIL, False, False)
            y = load(b, b_stride, b_rows, COUNT * CHUNK, CHANNELS, B, TAIL, ALL_B, False)
            total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    return total


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr):
    """Sums of a group, empty: COUNT tensors ``[ROWS, CHUNK]`` and one ``[ROWS, TAIL]``, fp32."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS, CHUNK], tl.float32),)
    if TAIL:
        sums = sums + (tl.zeros([ROWS, TAIL], tl.float32),)
    return sums


@triton.jit
def scaled(sums, factor):
    """Sums, each row times its factor ``[ROWS]``."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (sums[i] * factor[:, None],)
    return out


@triton.jit
def accumulate(
    sums, tile, b, b_stride, b_rows, channels,
    B: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    ALL_B: tl.constexpr, ALL_CHANNELS: tl.constexpr,
):  # fmt: skip
    """``sums + tile b``: a tile of weights ``[A, B]``, rounded to the dtype of b as tensor cores want it.

    ``channels`` are those b has from here on, where the group begins. ALL_CHANNELS: all whole chunks are within them.
    """
    tile = tile.to(b.dtype.element_ty)
    out = ()
    for i in tl.static_range(COUNT):
        y = load(b, b_stride, b_rows, i * CHUNK, channels, B, CHUNK, ALL_B, ALL_CHANNELS)
        out = out + (tl.dot(tile, y, sums[i], input_precision="ieee"),)
    if TAIL:
        y = load(b, b_stride, b_rows, COUNT * CHUNK, channels, B, TAIL, ALL_B, False)
        out = out + (tl.dot(tile, y, sums[COUNT], input_precision="ieee"),)
    return out


@triton.jit
def store(
    sums, out, stride, rows, channels, factor, seen,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Write sums times a factor (a number, or ``[ROWS, 1]``) to a ``[rows, channels]`` matrix at ``out``, in its dtype.

    ``seen`` is bool ``[ROWS]`` or None; rows that are not seen become zero.
    """
    row = tl.arange(0, ROWS)[:, None]
    for i in tl.static_range(len(sums)):
        column = i * CHUNK + tl.arange(0, CHUNK if i < COUNT else TAIL)[None, :]
        value = sums[i] * factor
        if seen is not None:
            value = tl.where(seen[:, None], value, 0.0)
        tl.store(out + row * stride + column, value.to(out.dtype.element_ty), mask=(row < rows) & (column < channels))
