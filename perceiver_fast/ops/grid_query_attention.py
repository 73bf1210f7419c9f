"""Attention of all queries of a grid, or of points, to few keys, at the cost of the queries' raw description.

The transpose of :mod:`perceiver_fast.ops.grid_attention`, for decoders of Perceiver IO. A query that is a linear map of
its description ``z_m = [x_m ; onehot(i_1) ; .. ; onehot(i_A)]`` on a grid (or of x_m alone, for points), after a LayerNorm
with its scale r_m or none, meets a key in that key's table: the product of the key and the map, F + n_1 + .. + n_A numbers.

    S[m, n] = r_m (tables[n, :F] . x_m + sum_a tables_a[n, i_a(m)]) + bias[n]
    P       = softmax over the keys n of S
    o[m]    = sum_n P[m, n] v[n]

A pair of query and key costs F + A multiply-adds, an exponential and as many multiply-adds as values have channels, so
whatever linear map follows is best applied to v beforehand: its heads are then summed up (``sum_heads``). Neither
queries nor anything else of size M, but the output and its gradient, ever exists, and nothing of size M x N; the backward
computes P again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.ops import blocks
from perceiver_fast.ops.checks import check_alike, check_dropout, check_mask, check_shape
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.library import (
    autocast_dtype,
    compute_dtype,
    cpu_error,
    dropout_seed,
    half_dtype,
    kernel_reasons,
    learns,
    triton_reasons,
    unless_autocast,
)
from perceiver_fast.ops.work import Shape, Work
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import own

OP = "grid_query_attention"


@dataclass(frozen=True)
class GridQueryAttentionCall:
    """What the choice of a backend may depend on."""

    dtype: torch.dtype
    device: torch.device
    axes: int = 1


def _cpu_reasons(call: GridQueryAttentionCall) -> list[str]:
    reasons = kernel_reasons(cpu_error(extension.error), "cpu", call.device, call.dtype)
    if call.axes > 64:
        reasons.append(f"it takes up to 64 axes, not {call.axes}")
    return reasons


def _triton_reasons(call: GridQueryAttentionCall) -> list[str]:
    return triton_reasons(call.device, call.dtype)


def grid_query_attention_work(tables: Shape, feat: Shape, v: Shape, grid: bool) -> Work:
    """tables ``[B, H, N, L]``, feat ``[B, *sizes, F]``, v ``[B, H, N, C]``: a logit is F + A multiply-adds, a value C."""
    pairs, axes = math.prod(tables[:3]) * math.prod(feat[1:-1]), (len(feat) - 2) * grid
    return Work(pairs * (feat[-1] + axes + v[-1]), pairs)


def _backward_work(tables: Shape, feat: Shape, v: Shape, grid: bool, token_grads: bool) -> Work:
    """Logits and weights' gradients, then the gradients of the tables, of v, and with token_grads of feat."""
    pairs, axes = math.prod(tables[:3]) * math.prod(feat[1:-1]), (len(feat) - 2) * grid
    return Work(pairs * (feat[-1] * (3 if token_grads else 2) + 2 * axes + 2 * v[-1]), pairs)


def _forward_outputs(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, need_lse):
    batch, heads = tables.shape[:2]
    queries, channels = math.prod(feat.shape[1:-1]), v.shape[-1]
    o = v.new_empty((batch, queries, channels) if sum_heads else (batch, queries, heads, channels))
    return o, tables.new_empty((batch, heads, queries) if need_lse else (0,), dtype=torch.float64)


def _backward_outputs(d_o, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, lse, token_grads):
    batch = tables.shape[0]
    return (
        tables.new_empty(tables.shape),
        feat.new_empty((batch, *feat.shape[1:]) if token_grads else (0,)),
        tables.new_empty((batch, *scale.shape[1:]) if token_grads and scale is not None else (0,)),
        tables.new_empty((0,) if bias is None else bias.shape),
        v.new_empty(v.shape),
    )


def _sample(
    make, dtype=torch.float32, heads=2, keys=5, features=3, sizes=(4, 6), channels=2, options=False, grid=True, half=None
):  # fmt: skip
    """With options it has a bias, a mask and dropout, adds the heads up, and its queries have no scale."""
    length, narrow = features + (sum(sizes) if grid else 0), half or dtype
    tables, feat = make(2, heads, keys, length, dtype=dtype), make(2, *sizes, features, dtype=narrow)
    v = make(2, heads, keys, channels, dtype=narrow)
    if options:
        bias, mask = make(2, heads, keys, dtype=dtype), make.mask(2, keys)
        arguments = tables, feat, None, bias, v, mask, grid, 0.1, make.seed(), True
    else:
        arguments = tables, feat, make.positive(2, *sizes, dtype=dtype), None, v, None, grid, 0.0, None, False
    o = GridQueryAttentionFunction.apply(*arguments)
    with torch.no_grad():
        torch.ops.perceiver_fast.grid_query_attention_into(torch.empty_like(o), *arguments)
    return o


def _instances():
    """By dtype, raw channels, sizes (one is of points), values' channels, and with options or without."""
    volume, image, points = (128, 128, 128), (368, 496), (2048,)
    for dtype, features, sizes, channels, options in (
        (torch.float32, 0, volume, 1, False),
        (torch.float32, 3, image, 3, True),
        (torch.float32, 52, points, 1, False),
        (torch.float32, 258, image, 512, True),
        (torch.bfloat16, 258, image, 512, False),
        (torch.bfloat16, 52, points, 130, True),
        (torch.float16, 3, image, 64, False),
    ):
        grid, half = len(sizes) > 1, None if dtype == torch.float32 else dtype
        name = f"{str(dtype).removeprefix('torch.')}, {f'{len(sizes)} axes' if grid else 'points'}, {features} channels"
        name += f", {channels} of values{', mask and dropout' if options else ''}"
        yield name, dict(
            half=half, features=features, sizes=sizes, grid=grid, channels=channels, keys=512, options=options
        )  # fmt: skip


def _trial(make, dtype):
    t_feat, *t_axes = (make(2, 2, 20, size, dtype=dtype) for size in (3, 4, 20))
    feat, v = make(2, 80, 3, dtype=dtype), make(2, 2, 20, 8, dtype=dtype)
    return grid_query_attention(t_feat, t_axes, feat, v, mask=make.mask(2, 20))


GRID_QUERY_ATTENTION = declare(
    OP,
    backends=(
        Backend("cpu", _cpu_reasons),
        Backend("triton", _triton_reasons),
        Backend("reference", lambda call: []),
    ),
    call=GridQueryAttentionCall,
    operators=(
        Operator(
            "grid_query_attention_forward(Tensor tables, Tensor feat, Tensor? scale, Tensor? bias, Tensor v, "
            "Tensor? mask, bool grid, float dropout, Tensor? seed, bool sum_heads, bool need_lse) "
            "-> (Tensor o, Tensor lse)",
            _forward_outputs,
            work=lambda *a: grid_query_attention_work(a[0], a[1], a[4], grid=a[6]),
            triton="grid_query_attention.forward",
        ),
        Operator(
            "grid_query_attention_into(Tensor(a!) out, Tensor tables, Tensor feat, Tensor? scale, Tensor? bias, Tensor v, "
            "Tensor? mask, bool grid, float dropout, Tensor? seed, bool sum_heads) -> ()",
            lambda *arguments: None,
            work=lambda *a: grid_query_attention_work(a[1], a[2], a[5], grid=a[7]),
            triton="grid_query_attention.into",
        ),
        Operator(
            "grid_query_attention_backward(Tensor d_o, Tensor tables, Tensor feat, Tensor? scale, Tensor? bias, "
            "Tensor v, Tensor? mask, bool grid, float dropout, Tensor? seed, bool sum_heads, Tensor lse, "
            "bool token_grads) -> (Tensor d_tables, Tensor d_feat, Tensor d_scale, Tensor d_bias, Tensor d_v)",
            _backward_outputs,
            work=lambda *a: _backward_work(a[1], a[2], a[5], grid=a[7], token_grads=a[12]),
            triton="grid_query_attention_backward.backward",
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=(
        {},
        dict(options=True),
        dict(sizes=(9,), grid=False, channels=5),
        dict(dtype=torch.float64, sizes=(2, 3, 2), features=0, channels=1),
    ),
    instances=dict(_instances()),
    kernels="grid_query_.*_kernel|cross_attention_hashes_kernel",
)


class GridQueryAttentionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs and lse, nothing of size N x M."""

    @staticmethod
    def forward(ctx, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads):
        o, lse = torch.ops.perceiver_fast.grid_query_attention_forward(
            tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, True
        )
        ctx.save_for_backward(tables, feat, scale, bias, v, mask, seed, lse)
        ctx.options = grid, dropout, sum_heads
        return o

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o):
        tables, feat, scale, bias, v, mask, seed, lse = ctx.saved_tensors
        grid, dropout, sum_heads = ctx.options
        token_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]

        def kernel():
            d_tables, d_feat, d_scale, d_bias, d_v = torch.ops.perceiver_fast.grid_query_attention_backward(
                d_o, tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads, lse, token_grads
            )
            if token_grads and feat.shape[0] != tables.shape[0]:  # the batch shares its queries
                d_feat = d_feat.sum(0, keepdim=True)
                d_scale = d_scale if scale is None else d_scale.sum(0, keepdim=True)
            d_feat = d_feat if token_grads else None
            d_scale = d_scale if token_grads and scale is not None else None
            return d_tables, d_feat, d_scale, None if bias is None else d_bias, d_v

        if differentiated_again():

            def form(tables, feat, scale, bias, v):
                feat, v = feat.to(tables.dtype), v.to(tables.dtype)
                return blocks.grid_query_attention(tables, feat, scale, bias, v, mask, grid, dropout, seed, sum_heads)

            inputs = tables, feat, scale, bias, v
            grads = differentiable(kernel, form, inputs, (d_o,), ctx.needs_input_grad[:5])
        else:
            grads = kernel()
        return *grads, None, None, None, None, None


@op_range(OP)
def grid_query_attention_unchecked(
    tables: Tensor,
    feat: Tensor,
    v: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    sum_heads: bool = False,
    grid: bool = True,
    half: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`grid_query_attention` with its tables joined, for callers that hold them so; inputs are not checked.

    Args:
        tables: ``[B, H, N, L]``, L = F + sum(sizes) on a grid, and F for points.
        feat: ``[B or 1, *sizes, F]``; F may be zero. For points ``[B or 1, M, F]``.
        v: ``[B, H, N, C]``.
        scale: ``[B or 1, *sizes]``, or None: one.
        bias: ``[B, H, N]``, or None: zero.
        mask: bool ``[B, N]`` or None.
        dropout, sum_heads: see :func:`grid_query_attention`.
        grid: whether the queries stand on a grid; else they are points.
        half: a half-precision dtype that GPUs round raw channels, weights and values to, for tensor cores; the result
            has it too. Default: what :func:`~perceiver_fast.ops.library.half_dtype` says of tables.
        backend: what runs it, where that has been chosen already. Default: it is chosen here.

    Returns:
        ``[B, M, H, C]``, or ``[B, M, C]`` with sum_heads.
    """
    compute, plain = compute_dtype(tables.dtype), transformed()
    if backend is None and not plain:
        axes = feat.dim() - 2 if grid else 0
        backend = GRID_QUERY_ATTENTION.require(GridQueryAttentionCall(compute, tables.device, axes))
    narrow = half or half_dtype(tables.device, tables.dtype) if backend == "triton" and not plain else None
    result = narrow or autocast_dtype(tables.device) or tables.dtype
    with unless_autocast(tables.device):
        seed = dropout_seed(dropout, tables.device)
        given = _given(tables, feat, scale, bias, v, narrow or compute)
        arguments: tuple[Any, ...] = (*given, mask, grid, dropout, seed, sum_heads)
        if plain or (backend == "reference" and tables.device.type != "cpu"):  # a GPU has no memory for N x M weights
            o = blocks.grid_query_attention(*arguments)
        elif backend == "reference":
            o, _ = reference.grid_query_attention(*arguments)
        elif learns(tables, feat, scale, bias, v):
            mask = None if mask is None else own(mask)  # its owner may refill it before the backward
            o = GridQueryAttentionFunction.apply(*arguments[:5], mask, *arguments[6:])
        else:
            o, _ = torch.ops.perceiver_fast.grid_query_attention_forward(*arguments, False)
    return o if tables.dtype == torch.float64 else o.to(result)


def _given(tables, feat, scale, bias, v, values: torch.dtype) -> tuple[Tensor | None, ...]:
    """Tensors in the dtypes that a backend computes in: raw channels and values in one of their own."""
    compute = compute_dtype(tables.dtype)
    pairs = (tables, compute), (feat, values), (scale, compute), (bias, compute), (v, values)
    return tuple(None if t is None else t.to(dtype) for t, dtype in pairs)


@op_range(OP)
def grid_query_attention_into(
    out: Tensor,
    tables: Tensor,
    feat: Tensor,
    v: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    sum_heads: bool = False,
    grid: bool = True,
    half: torch.dtype | None = None,
    backend: str | None = None,
) -> None:
    """:func:`grid_query_attention_unchecked` for inference, whose result is written into ``out``, of the result's shape.

    Elements of out's batch that are dense, as those of a part of an array in a file, are written where they are, without a
    copy, where the kernels run and out has the dtype that they compute in.
    """
    compute = compute_dtype(tables.dtype)
    if backend is None:
        axes = feat.dim() - 2 if grid else 0
        backend = GRID_QUERY_ATTENTION.require(GridQueryAttentionCall(compute, tables.device, axes))
    values = compute
    if backend == "triton":
        values = half = half or half_dtype(tables.device, tables.dtype) or compute
    with torch.no_grad():
        if backend == "reference" or out.dtype != values:
            out.copy_(
                grid_query_attention_unchecked(
                    tables, feat, v, scale, bias, mask, sum_heads=sum_heads, grid=grid, half=half, backend=backend
                )
            )
            return
        with unless_autocast(tables.device):
            given = _given(tables, feat, scale, bias, v, values)
            torch.ops.perceiver_fast.grid_query_attention_into(out, *given, mask, grid, 0.0, None, sum_heads)


def grid_query_attention(
    t_feat: Tensor | None,
    t_axes: Sequence[Tensor],
    feat: Tensor | None,
    v: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    sum_heads: bool = False,
) -> Tensor:
    """Softmax attention of the M queries of a grid, or of points, to N keys, from the keys' tables.

    ``S[m, n] = scale_m (t_feat[n] . feat_m + sum_a t_axes[a][n, i_a(m)]) + bias[n]`` with m running over the grid in
    row-major order, and the softmax over n; see the module's docstring for the maths and its use.

    Args:
        t_feat: ``[B, H, N, F]``, floating point: every key's products with the queries' raw channels, times the scale of
            the softmax. None: queries have nothing but a place on the grid.
        t_axes: one ``[B, H, N, n_a]`` per axis; the grid is n_1 x .. x n_A and M their product. Empty: the queries are
            points, described by feat alone.
        feat: ``[B, M, F]``, the raw channels of the queries, or ``[1, M, F]`` where the batch shares them; None with
            t_feat.
        v: ``[B, H, N, C]``, the values.
        scale: ``[B, M]``, or ``[1, M]`` like feat: the scale of every query (LayerNorm's 1/std). Default: one.
        bias: ``[B, H, N]``, added to a key's logits. Default: zero.
        mask: bool ``[B, N]``, True where a key may be attended to. Default: all of them. A batch element that is all
            False attends uniformly to all keys, as perceiver-pytorch does. A masked key's values are not looked at.
        dropout: probability of dropping a weight. Which ones is a function of a seed that is drawn from torch's
            generator, and of indices: the number of threads does not matter. Default: 0.
        sum_heads: add the heads' outputs up, for values that went through the map that follows. Default: False.

    Returns:
        ``[B, M, H, C]``, or ``[B, M, C]`` with sum_heads. float64 inputs are computed in float64, all others in float32,
        but that GPUs round raw channels, weights and values to a half-precision dtype of the inputs, or of autocast; the
        result has that dtype. Differentiable any number of times in all tensors but the mask. There are kernels for
        CPUs and for GPUs; float64 on GPUs, and other devices, have plain PyTorch, which forms the M x N weights.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Source:
        The identity is this package's; the mechanism is the decoder of Jaegle et al., "Perceiver IO", ICLR 2022.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import grid_query_attention
        >>> axes, v = (torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 6)), torch.randn(1, 2, 5, 3)
        >>> grid_query_attention(None, axes, None, v).shape  # 24 queries, 5 keys, 2 heads of 3 channels
        torch.Size([1, 24, 2, 3])
        >>> points, t_feat = torch.randn(1, 7, 8), torch.randn(1, 2, 5, 8)
        >>> grid_query_attention(t_feat, (), points, v, sum_heads=True).shape
        torch.Size([1, 7, 3])
    """
    t_axes = tuple(t_axes)
    sizes, batch = _check(t_feat, t_axes, feat, v, scale, bias, mask)
    check_dropout(OP, dropout)
    grid = bool(t_axes)
    if feat is None:  # queries of a grid
        feat = v.new_empty((batch, *sizes, 0))
    shape = sizes if grid else feat.shape[1:2]
    return grid_query_attention_unchecked(
        torch.cat([t for t in (t_feat, *t_axes) if t is not None], -1),
        feat.reshape(batch, *shape, feat.shape[-1]),
        v,
        None if scale is None else scale.reshape(batch, *shape),
        bias,
        mask,
        dropout,
        sum_heads,
        grid,
    )


def _check(t_feat, t_axes, feat, v, scale, bias, mask) -> tuple[tuple[int, ...], int]:
    """Raises unless all fit; returns the grid's sizes, and the batch size of the queries."""
    if t_feat is None and not t_axes:
        raise ValueError(f"{OP}: expected t_feat, or at least one axis in t_axes, got none")
    if (t_feat is None) != (feat is None):
        given, missing = ("feat", "t_feat") if t_feat is None else ("t_feat", "feat")
        raise ValueError(f"{OP}: expected t_feat and feat together, got {given} without {missing}")
    named = dict(
        v=v, t_feat=t_feat, **{f"t_axes[{a}]": t for a, t in enumerate(t_axes)}, feat=feat, scale=scale, bias=bias
    )
    check_alike(OP, **{name: t for name, t in named.items() if t is not None})
    if v.dim() != 4 or 0 in v.shape[1:]:
        raise ValueError(f"{OP}: expected v [B, H, N, C] with H, N and C of at least 1, got shape {tuple(v.shape)}")
    batch, heads, keys = v.shape[:3]
    for axis, t in enumerate(t_axes):
        if t.dim() != 4 or t.shape[:3] != v.shape[:3] or t.shape[3] == 0:
            raise ValueError(
                f"{OP}: expected t_axes[{axis}] [B, H, N, n_{axis + 1}] = [{batch}, {heads}, {keys}, at least 1] like v, "
                f"got shape {tuple(t.shape)}"
            )
    sizes = tuple(t.shape[3] for t in t_axes)
    queries, why = math.prod(sizes), f"the sizes of t_axes say a grid of {' x '.join(map(str, sizes))} queries"
    shared = 1
    if feat is not None:
        if feat.dim() != 3 or feat.shape[0] not in (batch, 1):
            raise ValueError(f"{OP}: expected feat [B or 1, M, F] with B = {batch}, got shape {tuple(feat.shape)}")
        shared = feat.shape[0]
        if not t_axes:
            queries, why = feat.shape[1], "feat has so many points"
        check_shape(OP, "feat", feat, (shared, queries, feat.shape[2]), why)
        check_shape(OP, "t_feat", t_feat, (batch, heads, keys, feat.shape[2]), "one number for every channel of feat")
    elif scale is not None and scale.dim() == 2 and scale.shape[0] == batch:
        shared = batch
    if scale is not None:
        check_shape(OP, "scale", scale, (shared, queries), why)
    if bias is not None:
        check_shape(OP, "bias", bias, (batch, heads, keys), "one number for every key of every head")
    check_mask(OP, mask, (batch, keys), v, "v")
    return sizes, shared
