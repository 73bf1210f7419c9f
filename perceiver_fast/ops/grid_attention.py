"""Attention of a few queries to all tokens of a grid, at the cost of the raw input.

A Perceiver token on a grid, ``z_m = [x_m ; e_1(i_1) ; .. ; e_A(i_A)]``, is a linear map of the sparse vector
``[x_m ; onehot(i_1) ; .. ; onehot(i_A)]``, and LayerNorm only subtracts a mean (a linear map too) and multiplies by a
scale ``r_m``. So keys are ``K_m = r_m (K_x x_m + sum_a K_a[i_a])`` and everything attention needs of them is the
product of each query with the columns of ``[K_x, K_1, .., K_A]``: F + n_1 + .. + n_A numbers a query, called q here.

    S[n, m] = r_m (q_feat[n] . x_m + sum_a q_axes_a[n, i_a(m)])
    P       = softmax over m of S
    o[n]    = sum_m P[n, m] r_m [x_m ; onehot(i_1) ; .. ; onehot(i_A)]

and the values' projection is applied to o, N rows, afterwards. Neither the encoding, nor keys, nor values, nor an
N x M matrix ever exists; the backward recomputes P from lse. Heads share the tokens, so they fold into N.

Inverted attention, ``P[n, m] = A[n, m] / sum_m A[n, m]`` with ``A = softmax over queries of S``, first sums every
token's softmax over the queries; dropout draws every weight's fate from a hash of its indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend, forced_again, forced_backend
from perceiver_fast.gpu import triton_error
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
    triton_reasons,
    unless_autocast,
)
from perceiver_fast.ops.work import Shape, Work
from perceiver_fast.ranges import op_range

OP = "grid_attention"
MOST_FEATURES = 64  # that the Triton kernels are compiled for
CUDA_FEATURES = {torch.bfloat16: 4, torch.float16: 3}  # and the CUDA kernels


@dataclass(frozen=True)
class GridAttentionCall:
    """What the choice of a backend may depend on."""

    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int, ...]
    features: int = 1
    inverted: bool = False
    half: torch.dtype | None = None  # the half-precision dtype of weights and values, if they have one
    dropout: float = 0.0


def _cpu_reasons(call: GridAttentionCall) -> list[str]:
    reasons = kernel_reasons(cpu_error(extension.error), "cpu", call.device, call.dtype)
    if len(call.sizes) > 64:
        reasons.append(f"it takes up to 64 axes, not {len(call.sizes)}")
    return reasons


def _triton_reasons(call: GridAttentionCall) -> list[str]:
    reasons = triton_reasons(call.device, call.dtype)
    if call.features > MOST_FEATURES:
        reasons.append(f"it takes up to {MOST_FEATURES} raw channels, not {call.features}")
    return reasons


def _cuda_reasons(call: GridAttentionCall) -> list[str]:
    reasons = kernel_reasons(extension.cuda_error, "cuda", call.device, call.dtype)
    reasons += [] if triton_error is None else [f"its sums are merged by Triton's kernels, and {triton_error}"]
    half = call.half or call.dtype
    if half not in CUDA_FEATURES:
        reasons.append(f"it takes channels in bfloat16 or float16, not {half}")
    if len(call.sizes) != 2:
        reasons.append(f"it takes grids of two axes, not {len(call.sizes)}")
    most = CUDA_FEATURES.get(half, max(CUDA_FEATURES.values()))
    if call.features > most:
        reasons.append(f"it takes up to {most} raw channels{f' in {half}' if call.half else ''}, not {call.features}")
    if call.dropout > 0:
        reasons.append("it drops no weights")
    if call.inverted:
        reasons.append("it has no inverted attention")
    return reasons


def grid_attention_work(q: Shape, feat: Shape, inverted: bool) -> Work:
    """q ``[B, N, L]``, feat ``[B, *sizes, F]``: a logit is F + A multiply-adds, a value F; inverted, logits come twice."""
    sizes, features = feat[1:-1], feat[-1]
    pairs, passes = q[0] * q[1] * math.prod(sizes), 1 + inverted
    return Work(pairs * (passes * (features + len(sizes)) + features), passes * pairs)


def _backward_work(q: Shape, feat: Shape, inverted: bool, token_grads: bool) -> Work:
    """Logits and weights' gradients (inverted: twice), the gradient of q, and with token_grads two parts of feat's."""
    sizes, features = feat[1:-1], feat[-1]
    pairs, passes = q[0] * q[1] * math.prod(sizes), 1 + inverted
    return Work(pairs * (2 * passes * (features + len(sizes)) + features * (3 if token_grads else 1)), passes * pairs)


def _forward_outputs(q, feat, scale, mask, dropout, seed, inverted):
    lse = q.new_empty(q.shape[:2], dtype=torch.float64)
    kept = q.new_empty(q.shape[:2] if dropout > 0 or inverted else (0,))
    token_lse = lse.new_empty((q.shape[0], math.prod(scale.shape[1:])) if inverted else (0,))
    return q.new_empty(q.shape), lse, kept, token_lse


def _backward_outputs(
    d_o, d_lse, d_kept, q, feat, scale, mask, dropout, seed, inverted, o, lse, kept, token_lse, token_grads
):
    dfeat = feat.new_empty((q.shape[0], *feat.shape[1:]) if token_grads else (0,))
    dscale = scale.new_empty((q.shape[0], *scale.shape[1:]) if token_grads else (0,))
    return q.new_empty(q.shape), dfeat, dscale


def _asked(q, feat, scale, mask, dropout, seed, inverted):
    """What the backends are asked about a call of the operators."""
    half = feat.dtype if feat.dtype in (torch.bfloat16, torch.float16) else None
    return GridAttentionCall(q.dtype, q.device, tuple(feat.shape[1:-1]), feat.shape[-1], inverted, half, dropout)


def _sample(
    make, dtype=torch.float32, features=3, options=False, queries=4, sizes=(5, 6), inverted=False, token_grads=True
):
    """With options it has a mask, dropout, and gradients of lse and of the sum of weights."""
    q, feat = make(2, queries, features + sum(sizes)), make(2, *sizes, features, dtype=dtype)
    scale = make.positive(2, *sizes)
    if not token_grads:
        feat, scale = feat.detach(), scale.detach()
    if not options:
        return GridAttentionFunction.apply(q, feat, scale, None, 0.0, None, inverted)[0]
    return GridAttentionFunction.apply(q, feat, scale, make.mask(2, *sizes), 0.1, make.seed(), inverted)


def _instances():
    """By dtype, raw channels, and with options or without; inverted."""
    for dtype, features, options in (
        *((torch.float32, *call) for call in ((3, False), (3, True), (8, True), (16, False), (64, False))),
        *((dtype, *call) for dtype in (torch.bfloat16, torch.float16) for call in ((3, False), (3, True), (64, False))),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {features} channels{', mask and dropout' if options else ''}"
        yield name, dict(dtype=dtype, features=features, options=options, queries=512, sizes=(224, 224))
    for features in (3, 64):
        name = f"float32, {features} channels, inverted, mask and dropout"
        yield name, dict(features=features, options=True, queries=512, sizes=(224, 224), inverted=True)


def _trial(make, dtype):
    in_cuda = make.tried == "cuda"  # whose kernels have no inverted attention, and are others for float16
    found: list[Tensor] = []
    for kind in (dtype, torch.float16) if in_cuda and dtype == torch.bfloat16 else (dtype,):
        q, axes = make(2, 20, 3, dtype=kind), [make(2, 20, size, dtype=kind) for size in (3, 40)]
        feat, scale = make(2, 120, 3, dtype=kind), make.positive(2, 120, dtype=kind)
        mask = make.mask(2, 120)
        o, o_axes, lse = grid_attention(q, axes, feat, scale, mask)
        found += [o, *o_axes, lse]
        if not in_cuda:
            p, p_axes, _ = grid_attention(q, axes, feat, scale, mask, inverted=True)
            found += [p, *p_axes]
    return found


GRID_ATTENTION = declare(
    OP,
    backends=(
        Backend("cpu", _cpu_reasons),
        Backend("cuda", _cuda_reasons),
        Backend("triton", _triton_reasons),
        Backend("reference", lambda call: []),
    ),
    call=lambda dtype, device: GridAttentionCall(dtype, device, (1,)),
    operators=(
        Operator(
            "grid_attention_forward(Tensor q, Tensor feat, Tensor scale, Tensor? mask, float dropout, Tensor? seed, "
            "bool inverted) -> (Tensor o, Tensor lse, Tensor kept, Tensor token_lse)",
            _forward_outputs,
            work=lambda *a: grid_attention_work(a[0], a[1], inverted=a[6]),
            triton="grid_attention.forward",
            cuda="grid_attention.forward_in_cuda",
            asks=_asked,
        ),
        Operator(
            "grid_attention_backward(Tensor d_o, Tensor? d_lse, Tensor? d_kept, Tensor q, Tensor feat, Tensor scale, "
            "Tensor? mask, float dropout, Tensor? seed, bool inverted, Tensor o, Tensor lse, Tensor kept, "
            "Tensor token_lse, bool token_grads) -> (Tensor dq, Tensor dfeat, Tensor dscale)",
            _backward_outputs,
            work=lambda *a: _backward_work(a[3], a[4], inverted=a[9], token_grads=a[14]),
            triton="grid_attention_backward.backward",
            cuda="grid_attention_backward.backward_in_cuda",
            asks=lambda *a: _asked(*a[3:10]),
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=({}, dict(options=True), dict(inverted=True), dict(token_grads=False)),
    instances=dict(_instances()),
    kernels="grid_(attention|inverted|planes|tokens)(_.*)?_kernel",
)


class GridAttentionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs, o and statistics, nothing of size N x M.

    Returns o, lse and kept, every query's weight sum: one, but for dropout and inverted attention.
    """

    @staticmethod
    def forward(ctx, q, feat, scale, mask, dropout, seed, inverted):
        o, lse, kept, token_lse = torch.ops.perceiver_fast.grid_attention_forward(
            q, feat, scale, mask, dropout, seed, inverted
        )
        ctx.save_for_backward(q, feat, scale, mask, seed, o, lse, kept, token_lse)
        ctx.options = dropout, inverted
        ctx.forced = forced_backend()
        ctx.set_materialize_grads(False)
        return o, lse, kept

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o, d_lse, d_kept):
        q, feat, scale, mask, seed, o, lse, kept, token_lse = ctx.saved_tensors
        dropout, inverted = ctx.options
        if dropout == 0 and not inverted:
            d_kept = None
        token_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]

        def kernel():
            d_out = torch.zeros_like(o) if d_o is None else d_o
            with forced_again(ctx.forced):
                dq, dfeat, dscale = torch.ops.perceiver_fast.grid_attention_backward(
                    d_out, d_lse, d_kept, q, feat, scale, mask, dropout, seed, inverted, o, lse, kept, token_lse,
                    token_grads,
                )  # fmt: skip
            if not token_grads:
                return dq, None, None
            if feat.shape[0] != q.shape[0]:  # heads apart
                dfeat, dscale = (d.unflatten(0, (feat.shape[0], -1)).sum(1) for d in (dfeat, dscale))
            return dq, dfeat, dscale

        if differentiated_again():

            def form(q, feat, scale):
                return blocks.grid_attention(q, feat.to(q.dtype), scale, mask, dropout, seed, inverted)

            grads = differentiable(kernel, form, (q, feat, scale), (d_o, d_lse, d_kept), ctx.needs_input_grad[:3])
        else:
            grads = kernel()
        return *grads, None, None, None, None


@op_range(OP)
def grid_attention_unchecked(
    q: Tensor,
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    heads: int = 1,
    half: torch.dtype | None = None,
    backend: str | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`grid_attention` with q_feat and q_axes joined, for callers that hold them so; inputs are not checked.

    Args:
        q: ``[B, H N, L]``, L = F + sum(sizes); may be expanded over B.
        feat: ``[B, *sizes, F]``.
        scale: ``[B, *sizes]``.
        mask: bool ``[B, *sizes]`` or None.
        dropout, inverted: see :func:`grid_attention`.
        heads: H. Only inverted attention, whose softmax runs over the queries of a head, needs to know.
        half: a half-precision dtype that weights and values are rounded to, for tensor cores. Default: what
            :func:`~perceiver_fast.ops.library.half_dtype` says of q.
        backend: what runs it, where that has been chosen already. Default: it is chosen here.
        seed: of dropout, see :mod:`perceiver_fast.reference.dropout`. Default: it is drawn here.

    Returns:
        o ``[B, H N, L]``, lse ``[B, H N]`` float64, and ``[B, H N]``, the sum of every query's weights after dropout
        or normalisation, or None where it is one.
    """
    result = autocast_dtype(q.device) or q.dtype
    compute = compute_dtype(q.dtype)
    sizes = tuple(feat.shape[1:-1])
    half = half or half_dtype(q.device, q.dtype)
    run: Callable[..., tuple[Tensor, Tensor, Any]]
    if transformed():
        backend, run = "reference", blocks.grid_attention
    else:
        if backend is None:
            backend = GRID_ATTENTION.require(
                GridAttentionCall(compute, q.device, sizes, feat.shape[-1], inverted, half, dropout)
            )
        plain = reference if q.device.type == "cpu" else blocks  # whose N x M weights a GPU has no memory for
        run = plain.grid_attention if backend == "reference" else GridAttentionFunction.apply
    shape = q.shape
    if inverted:
        q = q.unflatten(1, (heads, -1))
        # A softmax over one query is constant: its gradient is zero, exactly.
        q = (q * 0 if q.shape[2] == 1 else q).flatten(0, 1)
    # Inverted, Triton's kernels are float32 throughout.
    values = half or compute if backend in ("cuda", "triton") and not inverted else compute
    with unless_autocast(q.device):
        seed = dropout_seed(dropout, q.device) if seed is None else seed
        o, lse, kept = run(q.to(compute), feat.to(values), scale.to(compute), mask, dropout, seed, inverted)
    o = o.view(shape)
    kept = kept.view(shape[:2]) if dropout > 0 or inverted else None
    return o if result == compute or q.dtype == torch.float64 else o.to(result), lse.view(shape[:2]), kept


def grid_attention(
    q_feat: Tensor,
    q_axes: Sequence[Tensor],
    feat: Tensor,
    scale: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """Softmax attention of N queries to the M tokens of a grid, from per-axis tables.

    ``S[n, m] = scale_m (q_feat[n] . feat_m + sum_a q_axes[a][n, i_a(m)])`` with m running over the grid in row-major
    order; see the module's docstring for the maths and its use.

    Args:
        q_feat: ``[B, N, F]``, floating point. Heads fold into N.
        q_axes: one ``[B, N, n_a]`` per axis; the grid is n_1 x .. x n_A and M their product.
        feat: ``[B, M, F]``, the raw channels of the tokens.
        scale: ``[B, M]``, the scale of every token (LayerNorm's 1/std).
        mask: bool ``[B, M]``, True where a token may be attended to. Default: all of them. A row that is all False
            attends uniformly to all tokens, as perceiver-pytorch does, and has an lse of -3.4e38, float32's least
            number, in every dtype and on every backend.
        dropout: probability of dropping a weight. Which ones is a function of a seed that is drawn from torch's
            generator, and of indices: the number of threads does not matter. Default: 0.
        inverted: softmax over the N queries, then normalised over the tokens; lse is then the logarithm of its sum over
            the tokens, before that is bounded below by 1e-8. Default: False.

    Returns:
        o_feat ``[B, N, F]``, o_axes (one ``[B, N, n_a]`` per axis), and lse ``[B, N]``, the natural log-sum-exp of S,
        always float64. float64 inputs are computed in float64, all others in float32, but that GPUs round weights and
        values to a half-precision dtype of the inputs, or of autocast; the result has that dtype. Differentiable any
        number of times in q_feat, q_axes, feat and scale, through outputs and lse.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Source:
        The identity is this package's; the mechanism attended by is Jaegle et al., "Perceiver", ICML 2021, sec. 3.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import grid_attention
        >>> q_feat, q_axes = torch.randn(1, 5, 3), (torch.randn(1, 5, 4), torch.randn(1, 5, 6))
        >>> o_feat, (o_rows, o_columns), lse = grid_attention(q_feat, q_axes, torch.randn(1, 24, 3), torch.ones(1, 24))
        >>> o_feat.shape, o_rows.shape, o_columns.shape, lse.shape
        (torch.Size([1, 5, 3]), torch.Size([1, 5, 4]), torch.Size([1, 5, 6]), torch.Size([1, 5]))
        >>> bool((o_rows.sum(-1) - 1).abs().max() < 1e-6)  # scale is 1 here: a distribution over the rows
        True
    """
    q_axes = tuple(q_axes)
    sizes = _check(q_feat, q_axes, feat, scale, mask)
    check_dropout(OP, dropout)
    batch, features = feat.shape[0], feat.shape[-1]
    o, lse, _ = grid_attention_unchecked(
        torch.cat([q_feat, *q_axes], -1),
        feat.reshape(batch, *sizes, features),
        scale.reshape(batch, *sizes),
        None if mask is None else mask.reshape(batch, *sizes),
        dropout,
        inverted,
    )
    o_feat, *o_axes = o.split([features, *sizes], -1)
    return o_feat, tuple(o_axes), lse


def _check(q_feat, q_axes, feat, scale, mask) -> tuple[int, ...]:
    if not q_axes:
        raise ValueError(f"{OP}: expected at least one axis in q_axes, got none")
    check_alike(OP, q_feat=q_feat, **{f"q_axes[{a}]": t for a, t in enumerate(q_axes)}, feat=feat, scale=scale)
    if feat.dim() != 3:
        raise ValueError(f"{OP}: expected feat [B, M, F], got shape {tuple(feat.shape)}")
    if q_feat.dim() != 3:
        raise ValueError(f"{OP}: expected q_feat [B, N, F], got shape {tuple(q_feat.shape)}")
    batch, queries, features = q_feat.shape
    sizes = tuple(t.shape[-1] for t in q_axes)
    tokens = 1
    for axis, (t, size) in enumerate(zip(q_axes, sizes)):
        if t.dim() != 3 or tuple(t.shape[:2]) != (batch, queries) or size == 0:
            raise ValueError(
                f"{OP}: expected q_axes[{axis}] [B, N, n_{axis + 1}] = [{batch}, {queries}, at least 1], "
                f"got shape {tuple(t.shape)}"
            )
        tokens *= size
    if features == 0:
        raise ValueError(f"{OP}: expected at least one feature, got q_feat of shape {tuple(q_feat.shape)}")
    grid = f"the sizes of q_axes say a grid of {' x '.join(map(str, sizes))} tokens"
    check_shape(OP, "feat", feat, (batch, tokens, features), grid)
    check_shape(OP, "scale", scale, (batch, tokens), grid)
    check_mask(OP, mask, (batch, tokens), q_feat, "q_feat")
    return sizes
