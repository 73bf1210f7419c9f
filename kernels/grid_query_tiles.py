"""A tile of queries x keys of grid_query_attention: logits, gradients of weights, and sums. See that file for the maths.

Tiles are ``[M queries, N keys]``, keys along lanes. Where raw channels or values are few (FEW_F, FEW_C) they are
multiplied one by one, and "held" is a tuple of vectors, one a channel; else products of matrices are cut as in
dense_tiles.py. ``rows`` is a tuple of int64 ``[M]``: every query's row of the tables on each axis.
"""

from __future__ import annotations

import triton
import triton.language as tl

from perceiver_fast.kernels.dense_tiles import hold, load, product


@triton.jit
def grid_rows(m, n1, n2, n3, F: tl.constexpr, AXES: tl.constexpr):
    """The tables' rows of queries ``m [M]`` on a grid of ``n1 x n2 x n3``; sizes before the last AXES are 0."""
    rows = ()
    if AXES > 2:
        rows = rows + ((F + m // n3 // n2).to(tl.int64),)
    if AXES > 1:
        rows = rows + ((F + n1 + m // n3 % n2).to(tl.int64),)
    if AXES > 0:
        rows = rows + ((F + n1 + n2 + m % n3).to(tl.int64),)
    return rows


@triton.jit
def axes_sum(t, padded, rows, n, M: tl.constexpr, N: tl.constexpr):
    """``sum_a tables_a[n, i_a(m)]``, ``[M, N]``: before scaling, zero without axes."""
    total = tl.zeros([M, N], tl.float32)
    for a in tl.static_range(len(rows)):
        total += tl.load(t + rows[a][:, None] * padded + n[None, :])
    return total


@triton.jit
def load_table(t, padded, n, channel, F: tl.constexpr, WIDTH: tl.constexpr):
    """Rows ``channel ..`` of the raw channels' table, ``[WIDTH, N]``; zero from F on."""
    f = channel + tl.arange(0, WIDTH)[:, None]
    return tl.load(t + f * padded + n[None, :], mask=f < F, other=0.0)


@triton.jit
def load_scaled(x, stride, left, r, channel, F: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr):
    """Raw channels times their query's scale ``r [M]``, or as they are if it is None; ``[M, WIDTH]``, the dtype of x."""
    tile = load(x, stride, left, channel, F, M, WIDTH, False, False)
    if r is not None:
        tile = (tile.to(tl.float32) * r[:, None]).to(tile.dtype)
    return tile


@triton.jit
def hold_features(
    x, stride, left, r,
    M: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    FEW: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Scaled raw channels of a tile, for :func:`logits`; nothing where they are to be read again."""
    held = ()
    if FEW:
        row = tl.arange(0, M)
        for f in tl.static_range(F):
            value = tl.load(x + row * stride + f, mask=row < left, other=0.0).to(tl.float32)
            if r is not None:
                value = value * r
            held = held + (value,)
    elif HOLD:
        for i in tl.static_range(COUNT):
            held = held + (load_scaled(x, stride, left, r, i * CHUNK, F, M, CHUNK),)
        if TAIL:
            held = held + (load_scaled(x, stride, left, r, COUNT * CHUNK, F, M, TAIL),)
    return held


@triton.jit
def logits(
    axes, r, t, padded, n, bias, x, stride, left, held,
    M: tl.constexpr, F: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    FEW: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """``r axes + (r x) t + bias``, ``[M, N]`` natural logits; -inf for what is masked or beyond the last key."""
    s = axes
    if r is not None:
        s = s * r[:, None]
    if FEW:
        for f in tl.static_range(F):
            s += held[f][:, None] * tl.load(t + f * padded + n)[None, :]
    elif HOLD:
        for i in tl.static_range(COUNT):
            y = load_table(t, padded, n, i * CHUNK, F, CHUNK).to(x.dtype.element_ty)
            s = tl.dot(held[i], y, s, input_precision="ieee")
        if TAIL:
            y = load_table(t, padded, n, COUNT * CHUNK, F, TAIL).to(x.dtype.element_ty)
            s = tl.dot(held[COUNT], y, s, input_precision="ieee")
    else:
        for channel in tl.range(0, COUNT * CHUNK, CHUNK):
            y = load_table(t, padded, n, channel, F, CHUNK).to(x.dtype.element_ty)
            s = tl.dot(load_scaled(x, stride, left, r, channel, F, M, CHUNK), y, s, input_precision="ieee")
        if TAIL:
            y = load_table(t, padded, n, COUNT * CHUNK, F, TAIL).to(x.dtype.element_ty)
            s = tl.dot(load_scaled(x, stride, left, r, COUNT * CHUNK, F, M, TAIL), y, s, input_precision="ieee")
    return s + tl.load(bias + n)[None, :]


@triton.jit
def hold_gradients(
    g, stride, left,
    M: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    FEW: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """The output's gradient of a tile of queries, for :func:`weight_gradients`; nothing where it is to be read again."""
    if FEW:
        held = hold_features(g, stride, left, None, M, C, CHUNK, COUNT, TAIL, True, True)
    else:
        held = hold(g, stride, left, M, C, CHUNK, COUNT, TAIL, HOLD)
    return held


@triton.jit
def weight_gradients(
    g, stride, left, held, v, v_n, v_c, first, n,
    M: tl.constexpr, N: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
    FEW: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """``d_o v^T``, ``[M, N]``, of keys ``n = first ..``."""
    if FEW:
        u = tl.zeros([M, N], tl.float32)
        for c in tl.static_range(C):
            u += held[c][:, None] * tl.load(v + n * v_n + c * v_c).to(tl.float32)[None, :]
    else:
        at = v + tl.cast(first, tl.int64) * v_n
        u = product(g, stride, left, held, at, v_n, N, M, N, C, CHUNK, COUNT, TAIL, HOLD, True)
    return u


@triton.jit
def vector_zeros(LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """COUNT sums ``[LENGTH]``, fp32, empty."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LENGTH], tl.float32),)
    return sums


@triton.jit
def times(sums, factor, FEW: tl.constexpr):
    """Sums ``[M, ..]``, or vectors ``[M]`` if FEW, times a factor ``[M]`` of every row."""
    out = ()
    for i in tl.static_range(len(sums)):
        if FEW:
            out = out + (sums[i] * factor,)
        else:
            out = out + (sums[i] * factor[:, None],)
    return out


@triton.jit
def plus(sums, others):
    """Both, added up."""
    out = ()
    for i in tl.static_range(len(sums)):
        out = out + (sums[i] + others[i],)
    return out


@triton.jit
def store_vectors(sums, out, stride, left, LENGTH: tl.constexpr):
    """Write vectors ``[LENGTH]`` as the columns of ``[left, len(sums)]`` at ``out``, in its dtype."""
    row = tl.arange(0, LENGTH)
    for i in tl.static_range(len(sums)):
        tl.store(out + row * stride + i, sums[i].to(out.dtype.element_ty), mask=row < left)
