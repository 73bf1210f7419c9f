"""Grid attention, forward: N x M weights from F channels and two table entries a pair, none of them stored.

A program holds a tile of queries x columns and walks down the rows: the columns' table and their sums stay in
registers, a row costs one table entry a query. Few queries and many tokens: rows are split over programs, and partial
sums are merged.

    s = (column[n, j] + row[n, i] + g[n] . x) r        base-2 logits: r carries log2(e)
    p = exp2(s - shift)                                shift is 0: exp2 of logits within +-60 needs no maximum
    columns[n, j] += p r;  rows[n, i] = sum_j p r;  feat[n] += p r x;  total[n] += p

A program whose totals leave the range where float32 is exact (2^-60 .. 2^100) takes its rows again, first for the exact
maximum, then with it as shift. Nothing waits for the host to decide it, and no bound on the logits is needed.

With tensor cores (precision "bf16", "tf32", "ieee") the channels' part of the logits is a product with keys, and one
product with values collects channels, totals and the sums of eight rows apart.

Names: a query is a row n of the folded ``q [B, N, F + rows + columns]``, which holds g, row and column; heads are
folded into N. A token is at row i and column j, has channels x and a scale r. ``kept`` is the op's: the sum of a
query's weights after dropout, 1 but for the draw.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels import grid_attention_cuda, grid_inverted
from perceiver_fast.kernels.checks import HALF_OR_FLOAT, Check
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.dropout import hash_rows, threshold_bits
from perceiver_fast.kernels.grid import GROUP, Blocks, Grid, blocks, precision_of
from perceiver_fast.kernels.grid_attention_cuda import Sweep
from perceiver_fast.kernels.grid_attention_merge import MERGED, grid_attention_merge_kernel, merge_programs
from perceiver_fast.kernels.grid_attention_tokens import (
    HOLE,
    TokenArrays,
    describe_tokens,
    has_room,
    key_width,
    value_width,
)
from perceiver_fast.kernels.grid_sweep_fma import load_features, maximum_fma, sweep_fma
from perceiver_fast.kernels.grid_sweep_mma import load_packed, maximum_mma, sweep_mma
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.reference.dropout import dropout_scale
from perceiver_fast.reference.softmax import EMPTY_LSE

CHECK = Check("grid_attention")
LEAST_TOTAL, MOST_TOTAL = tl.constexpr(2.0**-60), tl.constexpr(2.0**100)  # beyond, a walk is taken again with a shift


@triton.jit
def place(program, N, columns, splits, BN: tl.constexpr, BJ: tl.constexpr):
    """A program's queries n ``[BN]``, block of columns, its columns j ``[BJ]``, split of the rows, and batch element.

    Blocks of queries follow each other first, then blocks of columns, splits and batch elements: neighbouring programs
    read the same tokens.
    """
    query_blocks, column_blocks = tl.cdiv(N, BN), tl.cdiv(columns, BJ)
    n = (program % query_blocks) * BN + tl.arange(0, BN)
    block = program // query_blocks % column_blocks
    split = program // (query_blocks * column_blocks) % splits
    b = (program // (query_blocks * column_blocks * splits)).to(tl.int64)
    return n, block, block * BJ + tl.arange(0, BJ), split, b


@triton.jit(do_not_specialize=["threshold"])
def grid_attention_forward_kernel(
    q, planes, scale, keys, values, seed, token_hashes, column_parts, row_parts, sum_parts,
    B, N, rows, columns, padded, q_batch, q_row, splits, per_split, threshold,
    F: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
    DROPOUT: tl.constexpr, HOLES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a split of the rows and a block of columns, in units of 2^shift, for a block of queries.

        s = (column + row + g . x) r,    p = 2^(s - shift),    sums of p r, p r x and p; see above

    Grid: one program for BN queries, BJ columns, a split and a batch element, see :func:`place`.

        q             [B, N, F + rows + columns]            in   fp32; strides q_batch (may be 0), q_row, the last dense
        planes        [B, rows, F + 2, padded]              in   fp32, of grid_attention_tokens; None but for "fma"
        scale         [B, rows, 2, padded]                  in   fp32, likewise; None for precision "fma"
        keys          [B, rows, padded, K]                  in   bf16 or fp32, likewise; None for precision "fma"
        values        [B, rows, padded, V]                  in   bf16 or fp32, likewise; None for precision "fma"
        seed          [1]                                   in   int64, or None without dropout
        token_hashes  [rows, padded]                        in   int32, or None without dropout
        column_parts  [splits, B, N, padded]                out  fp32: sum of p r by column
        row_parts     [column blocks, B, rows, N]           out  fp32: sum of p r by row
        sum_parts     [splits, column blocks, B, F + 3, N]  out  fp32: sums of p r x, of p, of p that is kept; shift

        B, N, rows, columns  sizes
        padded               columns in memory, a multiple of BJ
        splits, per_split    how many splits, and rows of one
        threshold            of dropout: p 2^32

        F                channels of a token
        K, V             columns of a key and of a value
        GROUP            rows whose sums stand apart in a product with values
        BN, BJ           tile of weights, queries x columns
        DROPOUT          some weights are dropped
        HOLES            there may be holes that keys do not close: grid_sweep_fma, grid_sweep_mma
        PRECISION        of products: grid.Grid

    Queries beyond the last read as zeros, and nothing of theirs is written. What q holds beyond the last column reads
    as zero; columns up to ``padded`` are holes and collect nothing.
    """
    n, block, j, split, b = place(tl.program_id(0), N, columns, splits, BN, BJ)
    live = n < N  # [BN]
    inside = live[:, None] & (j < columns)[None, :]
    query = q + b * q_batch + n.to(tl.int64) * q_row
    table = tl.load(query[:, None] + F + rows + j[None, :], mask=inside, other=0.0)  # [BN, BJ]
    row_hash = tl.zeros([BN], tl.uint32)
    if DROPOUT:
        row_hash = hash_rows(tl.load(seed), b * N + n)
        token_hashes += j
    rows_out = row_parts + ((block * B + b) * rows) * N + n
    step = b * 0 + N  # from row to row there, int64
    part = (split * B + b) * N + n
    sums_out = sum_parts + ((split * tl.cdiv(columns, BJ) + block) * B + b) * N * (F + 3) + n
    first, last = split * per_split, tl.minimum(rows, (split + 1) * per_split)
    shift = tl.zeros([BN], tl.float32)
    attempt, attempts = 0, 1
    if PRECISION == "fma":
        g = load_features(query, live, F)
        planes += b * rows * (F + 2) * padded + j
    else:
        g = load_packed(query, tl.full([BN], 1.0, tl.float32), live, F, K, PRECISION, True)
        at = b * rows * padded
        scale, keys, values = scale + 2 * at + j, keys + at * K, values + at * V
    while attempt < attempts:  # once, but for extreme logits
        known = tl.where(shift > float("-inf"), shift, 0.0)  # a query that met holes alone has no maximum
        if PRECISION == "fma":
            column_sums, sums, total, kept_total = sweep_fma(
                table, query + F, live, g, planes, padded, first, last, known, rows_out, step, row_hash, token_hashes,
                threshold, F, BN, BJ, DROPOUT, HOLES,
            )  # fmt: skip
            for f in tl.static_range(F):
                tl.store(sums_out + f * N, sums[f], mask=live)
        else:
            column_sums, acc, total, kept_total = sweep_mma(
                table, query + F, live, g, scale, keys, values, padded, first, last, j, known, rows_out, step, row_hash,
                token_hashes, threshold, F, K, V, GROUP, BN, BJ, DROPOUT, HOLES, PRECISION,
            )  # fmt: skip
            c = tl.arange(0, V)
            tl.store(sums_out[:, None] + c[None, :] * N, acc, mask=live[:, None] & (c < F)[None, :])
        tl.store(column_parts + part[:, None] * padded + j[None, :], column_sums, mask=live[:, None])
        tl.store(sums_out + F * N, total, mask=live)
        tl.store(sums_out + (F + 1) * N, kept_total, mask=live)
        tl.store(sums_out + (F + 2) * N, shift, mask=live)
        attempt += 1
        if attempt == 1:
            if tl.min(((total >= LEAST_TOTAL) & (total <= MOST_TOTAL) | (live == 0)).to(tl.int32), 0) == 0:
                attempts = 2
                if PRECISION == "fma":
                    shift = maximum_fma(table, query + F, live, g, planes, padded, first, last, F, BN, HOLES)
                else:
                    shift = maximum_mma(
                        table, query + F, live, g, scale, keys, padded, first, last, j, K, BN, HOLES, PRECISION
                    )
                shift = tl.where(shift > HOLE / 2, shift, float("-inf"))  # -inf: nothing but holes


def seen(q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Queries, mask, and which batch elements are all masked: those attend uniformly, as zero queries unmasked do.

    Everything is computed on the device, without waiting for it.

    Returns:
        q with zeros for batch elements that are all masked, the mask as dense uint8 ``[B, *sizes]`` without them, and
        which they are, bool ``[B]``; or q, None and None without a mask.
    """
    if mask is None:
        return q, None, None
    empty = ~mask.flatten(1).any(1)
    mask = (mask | empty.view(-1, *(1 for _ in mask.shape[1:]))).contiguous()
    return q.masked_fill(empty[:, None, None], 0.0), mask.view(torch.uint8), empty


def forward_launches(
    q: Tensor, feat: Tensor, scale: Tensor, mask: Tensor | None, dropout: float, seed: Tensor | None, arch: int,
    in_cuda: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Launch | Sweep]]:  # fmt: skip
    """o ``[B, N, F + rows + columns]``, lse ``[B, N]``, kept ``[B, N]`` or empty, and the launches that compute them.

    q is folded (``Grid.fold``), the mask as :func:`seen` gives it, feat and scale dense; seed is None without dropout.
    ``in_cuda``: the sweep is the CUDA library's.
    """
    grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), precision_of(feat.dtype, feat.shape[-1]))
    config = (
        grid_attention_cuda.forward_config(arch) if in_cuda else grid.config("grid_attention_forward", arch, dropout)
    )
    cut = blocks(grid, config, q.device)
    launches: list[Launch | Sweep] = []
    if in_cuda:
        width = grid_attention_cuda.padded(grid.columns)
    else:
        tokens, launches = describe_tokens(grid, feat, scale, mask, seed)
        width = tokens.padded
    column_parts = q.new_empty(cut.splits, grid.batch, grid.queries, width)
    row_parts = q.new_empty(cut.columns, grid.batch, grid.rows, grid.queries)
    sum_parts = q.new_empty(cut.partials, grid.batch, grid.features + 3, grid.queries)
    common = sizes(grid, cut, width) | dict(
        column_parts=column_parts, row_parts=row_parts, sum_parts=sum_parts, per_split=cut.rows_per_split,
        F=grid.features, BJ=config.tokens,
    )  # fmt: skip
    if in_cuda:
        parts = column_parts, row_parts, sum_parts
        launches.append(Sweep("grid_attention_sums", (q, feat, scale, mask, *parts, cut.splits, cut.rows_per_split)))
    else:
        sweep = common | sweep_arguments(grid, tokens, q, seed, dropout, config) | dict(HOLES=holes(grid, mask, config))
        programs = cut.queries * cut.columns * cut.splits * grid.batch
        launches.append(Launch(grid_attention_forward_kernel, programs, sweep, config, config.queries * config.tokens))
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:2], dtype=torch.float64)
    kept = q.new_empty(q.shape[:2] if dropout > 0 else (0,))
    merge = common | dict(o=o, lse=lse, kept=kept if dropout > 0 else None, column_blocks=cut.columns)
    merge |= MERGED | dict(keep_scale=dropout_scale(dropout), PARTS=triton.next_power_of_2(cut.partials))
    launches.append(Launch(grid_attention_merge_kernel, merge_programs(grid), merge))
    return o, lse, kept, launches


def sizes(grid: Grid, cut: Blocks, padded: int) -> dict[str, int]:
    """The sizes that sweeps and merges take."""
    return dict(
        B=grid.batch, N=grid.queries, rows=grid.rows, columns=grid.columns, padded=padded, splits=cut.splits,
    )  # fmt: skip


def holes(grid: Grid, mask: Tensor | None, config: Config) -> bool:
    """Whether a block may hold tokens that are none, masked or beyond the last column, and no key closes them."""
    return not has_room(grid) and (mask is not None or grid.columns % config.tokens != 0)


def sweep_arguments(
    grid: Grid, tokens: TokenArrays, q: Tensor, seed: Tensor | None, dropout: float, config: Config
) -> dict[str, object]:
    """What the kernels that walk down the rows take beside sizes and sums."""
    return dict(
        q=q, planes=tokens.planes, scale=tokens.scale, keys=tokens.keys, values=tokens.values, seed=seed,
        token_hashes=tokens.token_hashes, q_batch=q.stride(0), q_row=q.stride(1), threshold=threshold_bits(dropout),
        K=key_width(grid), V=value_width(grid), GROUP=GROUP, BN=config.queries, DROPOUT=dropout > 0,
        PRECISION=grid.precision,
    )  # fmt: skip


def check(q, feat, scale, mask, dropout, seed, inverted) -> None:
    """Raises what these kernels cannot take: the public function never asks for it, who calls the registered op may.

    Raises:
        RuntimeError: another dtype, rank or size.
    """
    CHECK.rank("q", q, 3, "[B, N, L]")
    CHECK.expect(feat.dim() >= 3, "feat [B, *sizes, F] of at least one axis", f"shape {list(feat.shape)}")
    batch, *sizes, features = feat.shape
    if inverted and batch:  # heads apart
        batch *= q.shape[0] // batch
    CHECK.expect(features > 0 and all(sizes), "at least one channel, and no empty axis", f"feat {list(feat.shape)}")
    CHECK.tensor("q", q, torch.float32, (batch, q.shape[1], features + sum(sizes)), "[B, N, F + sum(sizes)]")
    CHECK.dtype("feat", feat, *HALF_OR_FLOAT)
    CHECK.tensor("scale", scale, torch.float32, feat.shape[:-1], "[B, *sizes]")
    CHECK.tensor("mask", mask, torch.bool, feat.shape[:-1], "[B, *sizes]")
    CHECK.dropout(dropout, seed)


def forward(
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kernel of the operator ``grid_attention_forward``.

    Args:
        q: ``[B, N, L]`` float32; may be expanded over B.
        feat: ``[B, *sizes, F]``: float32, or a half-precision dtype, which then is that of weights and values.
        scale: ``[B, *sizes]`` float32.
        mask, dropout, seed: see :mod:`perceiver_fast.ops.grid_attention`.
        inverted: softmax over the queries, then normalised over the tokens: then q may have several times feat's batch.

    Returns:
        o ``[B, N, L]`` float32, lse ``[B, N]`` float64 (-3.4e38 where all is masked), kept ``[B, N]`` (empty without dropout), and an empty tensor.
        Inverted: see :func:`perceiver_fast.kernels.grid_inverted.forward`.

    Raises:
        RuntimeError: see :func:`check`.
    """
    return _forward(q, feat, scale, mask, dropout, seed, inverted, in_cuda=False)


def forward_in_cuda(
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward` with the CUDA library's sweep, of the calls that the op's declaration gives to it."""
    return _forward(q, feat, scale, mask, dropout, seed, inverted, in_cuda=True)


def _forward(q, feat, scale, mask, dropout, seed, inverted, in_cuda) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(q, feat, scale, mask, dropout, seed, inverted)
    grid = Grid(*q.shape[:2], feat.shape[-1], tuple(feat.shape[1:-1]), precision_of(feat.dtype, feat.shape[-1]))
    nothing = q.new_empty(0, dtype=torch.float64)
    if inverted and q.numel() > 0:
        return grid_inverted.forward(q, feat, scale, mask, dropout, seed)
    if q.shape[0] * q.shape[1] == 0:
        if inverted:
            nothing = nothing.new_full((q.shape[0], scale.shape[1:].numel()), float("-inf"))
        kept = q.new_empty(q.shape[:2] if dropout > 0 or inverted else (0,))
        return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float64), kept, nothing
    q, mask, empty = seen(q, mask)
    o, lse, kept, launches = forward_launches(
        grid.fold(q), feat.contiguous(), scale.contiguous(), mask, dropout, seed if dropout > 0 else None,
        architecture(q.device), in_cuda,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    if empty is not None:
        lse = lse.masked_fill(empty[:, None], EMPTY_LSE)
    return grid.unfold(o), lse, kept, nothing
