"""Backward of streaming attention: the weights are computed again from the log-sum-exp.

    S = scale q k^T,    P = 2^(log2(e) (S - lse)),    dP = d_o v^T,    dS = P (dP - delta),    delta = sum d_o o - d_lse
    dv = P^T d_o,    dk = scale dS^T q,    dq = scale dS k

One kernel owns queries and walks over tokens for dq, another owns tokens and walks over queries for dk and dv
(cross_attention_gradients.py); sums that were split are added up in order, so that results are the same bits every
time. Every matrix is read as it lies.

Over all tokens dS sums to d_lse. By what the sum differs from it, delta is wrong, since it was made of rounded outputs.
Beside gradients of ordinary size the error is nothing. Where softmax is saturated gradients are tiny, and it shows: so
in fp32 delta is corrected before dk is computed, and blocks of queries whose delta was wrong compute dq once more. The
GPU decides which, and the host does not wait for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.gpu import architecture
from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.configs import Config
from perceiver_fast.kernels.cross_attention import CHECK, MERGED, check, common, summed, variant
from perceiver_fast.kernels.cross_attention_gradients import cross_attention_dkv_kernel, cross_attention_dq_kernel
from perceiver_fast.kernels.cross_attention_inverted import LOG_EPS, token_terms, whole_and_factor
from perceiver_fast.kernels.dense_tiles import Pieces, load
from perceiver_fast.kernels.launch import Launch, aligned_rows, share, strides

TOLERANCE = tl.constexpr(16 * 2.0**-23)  # delta is wrong where dS sums up to more than this share of its magnitudes


@triton.jit
def cross_attention_terms_kernel(
    d_o, d_lse, o, lse, shift, weight, delta, heads, queries, blocks, g_b, g_h, g_n,
    V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, INVERTED: tl.constexpr,
):  # fmt: skip
    """Of every query row delta, and its log-sum-exp as a whole number and a factor: P = 2^(log2(e) S - shift) weight.

    Inverted, weight is 1 / max(T, EPS) and shift is not read; where T is clamped P does not depend on it: delta is zero.

    Grid: ``blocks * B * H`` programs of BLOCK_N queries. Queries beyond the last read as zero and are not written.

        d_o                   [B, H, N, V]  in   fp32, fp16 or bf16; strides g_b, g_h, g_n, channels dense
        d_lse                 [B H N]       in   fp64, or None
        o                     [B, H, N, V]  in   dtype of d_o, dense
        lse                   [B H N]       in   fp64
        shift, weight, delta  [B H N]       out  fp32

        heads, queries, blocks  H, N, and blocks of BLOCK_N queries
        V, BLOCK_N, BLOCK_V     channels of v, and the tile that is read at a time
        INVERTED                lse is the logarithm of T
    """
    pid = tl.program_id(0)
    head, n = (pid // blocks).to(tl.int64), pid % blocks * BLOCK_N
    rows = n + tl.arange(0, BLOCK_N)
    at, there = head * queries + rows, rows < queries
    d_o += head // heads * g_b + head % heads * g_h + tl.cast(n, tl.int64) * g_n
    o += (head * queries + n) * V
    total = tl.zeros([BLOCK_N], tl.float32)
    for channel in tl.range(0, V, BLOCK_V):
        x = load(d_o, g_n, queries - n, channel, V, BLOCK_N, BLOCK_V, False, False).to(tl.float32)
        y = load(o, V, queries - n, channel, V, BLOCK_N, BLOCK_V, False, False).to(tl.float32)
        total += tl.sum(x * y, 1)
    natural = tl.load(lse + at, mask=there, other=0.0)
    divided = natural
    if INVERTED:
        divided = tl.where(natural <= LOG_EPS, LOG_EPS, natural)
        total = tl.where(natural > LOG_EPS, total, 0.0)
    if d_lse is not None:  # the weights are of the sum that they are divided by
        share = tl.math.exp2(((divided - natural) * LOG2_E).to(tl.float32))
        total -= tl.load(d_lse + at, mask=there, other=0.0).to(tl.float32) * share
    whole, factor = whole_and_factor(divided)
    if INVERTED:
        factor *= tl.math.exp2(-whole)
    tl.store(shift + at, whole, mask=there)
    tl.store(weight + at, factor, mask=there)
    tl.store(delta + at, total, mask=there)


@triton.jit
def cross_attention_settle_kernel(
    residues, sizes, d_lse, lse, delta, flags, queries, blocks, splits, rows, BLOCK_N: tl.constexpr
):
    """Correct delta where the sums of dS say that it is wrong, and flag the blocks of queries that have such rows.

        error = sum_s residues[s] - d_lse,    wrong = |error| > TOLERANCE sum_s sizes[s],    delta += error where wrong

    Grid: ``blocks * B * H`` programs of BLOCK_N queries. Queries beyond the last read as zero: they are not wrong.

        residues, sizes  [splits, rows]    in      fp32: over a split's tokens the sum of dS, and of its magnitudes
        d_lse            [rows]            in      fp64, or None
        lse              [rows]            in      fp64, inverted: a row whose normaliser is EPS has no delta; else None
        delta            [rows]            in out  fp32
        flags            [B H, blocks]     out     int32: 1 where a row of the block was wrong, else 0

        queries, blocks, splits, rows  N, blocks of BLOCK_N queries, splits of the tokens, B H N
    """
    pid = tl.program_id(0)
    row = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    at, there = (pid // blocks).to(tl.int64) * queries + row, row < queries
    error = tl.zeros([BLOCK_N], tl.float32)
    size = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.range(0, splits):
        part = tl.cast(split, tl.int64) * rows + at
        error += tl.load(residues + part, mask=there, other=0.0)
        size += tl.load(sizes + part, mask=there, other=0.0)
    if d_lse is not None:
        error -= tl.load(d_lse + at, mask=there, other=0.0).to(tl.float32)
    wrong = tl.abs(error) > size * TOLERANCE
    if lse is not None:
        wrong = wrong & (tl.load(lse + at, mask=there, other=0.0) > LOG_EPS)
    tl.store(delta + at, tl.load(delta + at, mask=there, other=0.0) + error, mask=there & wrong)
    tl.store(flags + pid, tl.max(wrong.to(tl.int32)))


@triton.jit
def cross_attention_add_kernel(parts, out, count, splits, BLOCK: tl.constexpr, MERGED: tl.constexpr):
    """``out = sum_s parts[s]``, in the order of the splits.

    Grid: a program a BLOCK of elements; those beyond ``count`` and splits beyond the last read as zero.

        parts  [splits, count]  in   fp32
        out    [count]          out  fp32, fp16 or bf16

        MERGED  splits read at a time
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.range(0, splits, MERGED):
        split = (s + tl.arange(0, MERGED)).to(tl.int64)[:, None]
        part = tl.load(parts + split * count + i[None, :], mask=(split < splits) & (i < count)[None, :], other=0.0)
        total += tl.sum(part, 0)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


def _summing(names: tuple[str, str, str], cut: Pieces) -> dict[str, int]:
    """How the channels of a sum are cut, under the names of a kernel's constants."""
    return dict(zip(names, (cut.chunk, cut.count, cut.tail)))


def _split(out: Tensor, splits: int) -> tuple[Tensor, list[Launch]]:
    """Where ``splits`` programs leave their parts of ``out``, and the launches that add them up."""
    if splits == 1:
        return out, []
    parts = out.new_empty(splits, *out.shape, dtype=torch.float32)
    numbers = dict(parts=parts, out=out, count=out.numel(), splits=splits, BLOCK=128, MERGED=MERGED)
    return parts, [Launch(cross_attention_add_kernel, triton.cdiv(out.numel(), 128), numbers)]


def _walk_tokens(
    arguments: dict, c: Config, splits: int, each: int, cut_k: Pieces, cut_v: Pieces, groups: int, **outputs: object
) -> Launch:
    """The walk of all tokens over the queries that computes ``outputs``: dk, dv and eta_out."""
    queries, blocks = arguments["queries"], triton.cdiv(arguments["tokens"], c.tokens)
    given = arguments | outputs | dict(
        blocks=blocks, splits=splits, queries_per_split=each, GROUPS=groups,
        BLOCK_N=c.queries, BLOCK_M=c.tokens, EVEN=queries % c.queries == 0,
    )  # fmt: skip
    given |= _summing(("K_SUM", "K_SUMS", "K_REST"), cut_k) | _summing(("V_SUM", "V_SUMS", "V_REST"), cut_v)
    programs = arguments["q"].shape[:2].numel() * blocks * groups * splits
    return Launch(cross_attention_dkv_kernel, programs, given, c, c.queries * c.tokens)


def _etas(arguments: dict, c: Config, low: bool) -> tuple[dict[str, Tensor], list[Launch]]:
    """What inverted attention subtracts from every token's gradients of weights, and the launches that compute it.

    With ``low`` the rounding error of eta, too, by a second walk: where one query has all of a token's weight, what
    remains is nothing but rounding otherwise.
    """
    shape, nothing = arguments["token_shift"].shape, Pieces(16, 0, 0)
    splits, each = share(
        arguments["queries"], c.queries, shape[:2].numel() * triton.cdiv(shape[2], c.tokens), arguments["q"].device
    )
    found, launches = {}, []
    for name in ("eta", "eta_low") if low else ("eta",):
        out = arguments["token_shift"].new_empty(shape)
        parts, adding = _split(out, splits)
        walk = _walk_tokens(arguments | found, c, splits, each, nothing, nothing, 1, dk=None, dv=None, eta_out=parts)
        launches += [walk, *adding]
        found[name] = out
    return found, launches


def backward_launches(
    d_o, d_lse, q, k, v, mask, scale, dropout, seed, o, lse, arch: int, token_lse: Tensor | None = None,
    to_tokens: bool = True,
) -> tuple[Tensor, Tensor, Tensor, list[Launch]]:  # fmt: skip
    """dq, dk and dv, of the shapes of q, k and v, and the launches that compute them; without ``to_tokens`` dk and dv are empty.

    ``arch`` is the architecture whose configurations are taken, ``token_lse`` is given where attention is inverted; other
    arguments are those of :func:`backward`.
    """
    dq = q.new_empty(q.shape)
    dk, dv = (t.new_empty(t.shape if to_tokens else (0,)) for t in (k, v))
    q, k, v, d_o = (aligned_rows(t) for t in (q, k, v, d_o))
    (batch, heads, queries, dim), (tokens, value_dim) = q.shape, v.shape[2:]
    rows, pairs, dtype = lse.numel(), batch * heads, q.dtype
    if rows == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), []
    d_lse = None if d_lse is None else d_lse.contiguous()
    wide = max(dim, value_dim)
    narrow = wide <= 64
    shift, weight, delta = lse.new_empty(3, rows, dtype=torch.float32)
    inverted = token_lse is not None
    launches, arguments = common(q, k, v, mask, scale, dropout, seed)
    of_tokens, arrays = token_terms(token_lse, arguments)
    arguments |= arrays | strides("g", "bhn", d_o) | dict(
        d_o=d_o, shift=shift, weight=weight, delta=delta, eta=None, eta_low=None, scale=scale,
        HOLD=narrow and dtype != torch.float32,
    )  # fmt: skip
    terms = dict(d_o=d_o, d_lse=d_lse, o=o.contiguous(), lse=lse, shift=shift, weight=weight, delta=delta)
    terms |= dict(heads=heads, queries=queries, blocks=triton.cdiv(queries, 16), V=value_dim, BLOCK_N=16, BLOCK_V=64)
    terms |= strides("g", "bhn", d_o) | dict(INVERTED=inverted)
    launches += [*of_tokens, Launch(cross_attention_terms_kernel, pairs * terms["blocks"], terms)]

    c = variant("dq", dtype, wide, arch, inverted)
    cut = summed(dim, dtype, dropout, arch)
    blocks = triton.cdiv(queries, c.queries)
    programs = pairs * blocks * cut.groups
    splits, each = share(tokens, c.tokens, programs, q.device)
    parts, adding = _split(dq, splits)
    flags, residues, sizes = None, None, None
    if dtype == torch.float32:
        flags = lse.new_ones(pairs * blocks, dtype=torch.int32)
        residues, sizes = lse.new_empty(2, splits, rows, dtype=torch.float32)
    for_queries = arguments | _summing(("CHUNK", "COUNT", "TAIL"), cut) | dict(
        flags=flags, dq=parts, residues=residues, sizes=sizes, blocks=blocks, splits=splits, tokens_per_split=each,
        GROUPS=cut.groups, BLOCK_N=c.queries, BLOCK_M=c.tokens, EVEN=tokens % c.tokens == 0,
    )  # fmt: skip

    def walk(groups: int = cut.groups, **changed: object) -> Launch:
        given = for_queries | dict(GROUPS=groups) | changed
        return Launch(cross_attention_dq_kernel, pairs * blocks * groups * splits, given, c, c.queries * c.tokens)

    settle = dict(residues=residues, sizes=sizes, d_lse=d_lse, lse=lse if inverted else None, delta=delta, flags=flags)
    settle |= dict(queries=queries, blocks=blocks, splits=splits, rows=rows, BLOCK_N=c.queries)
    settled = Launch(cross_attention_settle_kernel, pairs * blocks, settle)
    if not inverted:
        launches += [walk()] if flags is None else [walk(), settled, walk()]
    else:  # what the tokens subtract depends on delta
        launches += [] if flags is None else [walk(1, dq=None), settled]
        etas, found = _etas(arguments, variant("dkv", dtype, wide, arch, True), dtype == torch.float32)
        arguments |= etas
        launches += [*found, walk(flags=None, residues=None, sizes=None, **etas)]
    launches += adding
    if not to_tokens:
        return dq, dk, dv, launches

    c = variant("dkv", dtype, wide, arch, inverted)
    cut_k, cut_v = (summed(channels, dtype, dropout, arch) for channels in (dim, value_dim))
    # Both in one walk if a thread holds the sums of both; else P is computed for each.
    together = narrow and not (inverted and dtype == torch.float32)
    for out_k, out_v in ((dk, dv),) if together else ((None, dv), (dk, None)):
        groups = max(cut.groups for cut, out in ((cut_k, out_k), (cut_v, out_v)) if out is not None)
        splits, each = share(queries, c.queries, pairs * triton.cdiv(tokens, c.tokens) * groups, q.device)
        (parts_k, adding_k), (parts_v, adding_v) = (
            (None, []) if out is None else _split(out, splits) for out in (out_k, out_v)
        )
        launches.append(
            _walk_tokens(arguments, c, splits, each, cut_k, cut_v, groups, dk=parts_k, dv=parts_v, eta_out=None)
        )
        launches += adding_k + adding_v
    return dq, dk, dv, launches


def backward(
    d_o: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    inverted: bool,
    o: Tensor,
    lse: Tensor,
    token_lse: Tensor,
    to_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Kernel of the operator ``cross_attention_backward``: gradients of q, k and v.

    Args:
        d_o: ``[B, H, N, V]``, the dtype of q, of any strides.
        d_lse: ``[B, H, N]`` float64, or None.
        q, k, v, mask, scale, dropout, seed, inverted: as the forward's.
        o, lse, token_lse: what the forward returned.
        to_tokens: whether those of k and v are needed; if not, they are empty.

    Raises:
        RuntimeError: see :func:`perceiver_fast.kernels.cross_attention.check`.
    """
    check(q, k, v, mask, scale, dropout, seed)
    rows = q.shape[:3]
    for name, t in (("d_o", d_o), ("o", o)):
        CHECK.tensor(name, t, q.dtype, (*rows, v.shape[3]), "[B, H, N, dv]")
    for name, t in (("lse", lse), ("d_lse", d_lse)):
        CHECK.tensor(name, t, torch.float64, rows, "[B, H, N]")
    expected, form = ((*k.shape[:3],), "[B, H, M]") if inverted else ((0,), "empty")
    CHECK.tensor("token_lse", token_lse, torch.float64, expected, form)
    arch, lse = architecture(q.device), lse.contiguous()
    *grads, launches = backward_launches(
        d_o, d_lse, q, k, v, mask, scale, dropout, seed, o, lse, arch, token_lse.contiguous() if inverted else None,
        to_tokens,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return tuple(grads)
