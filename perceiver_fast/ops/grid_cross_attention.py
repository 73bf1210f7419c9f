"""A small model's cross-attention to a grid, or to tokens of no axis, in one call: LayerNorms, projections, residual.

    q = LayerNorm(x) to_q^T        W = to_kv gamma - mean        [K, V] = W E^T,  b = to_kv_v beta
    y = x + (grid_attention(q K) V + b) to_out^T + to_out_bias

gamma and beta are those of the tokens' LayerNorm, and E the tokens of one raw channel or one index alone (see
layers/cross_attention_ways.py): a block of raw channels, and a block of codes for each axis. Where raw channels come less
their mean and with it, E has a row for the mean: minus one in every channel of codes, the same to centred weights as one in
every raw channel. Tokens of no axis, which are normalised already, are all raw channels: attention runs over these themselves,
``y = x + (cross_attention(q K, E, E) V + b) to_out^T + to_out_bias``. The calls from which
layers/cross_attention.py puts the same together cost a small model more than what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from perceiver_fast import reference
from perceiver_fast.ops.checks import check_alike, check_dropout, check_mask, check_shape
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.grid_attention import grid_attention_work
from perceiver_fast.ops.latent_layers import CPU_BACKENDS, padded, padded_columns
from perceiver_fast.ops.library import compute_dtype, dropout_seed, learns, narrowed, unless_autocast, widened
from perceiver_fast.ops.pointwise import PointwiseCall, runs_kernel
from perceiver_fast.ops.work import Work, attention_work
from perceiver_fast.ranges import op_range

OP = "grid_cross_attention"


def _queries(x, feat, heads, axes) -> tuple[int, int, int]:
    """The shape of the queries that a latent's batch has: ``[B, H N, L]``."""
    return x[0], heads * x[1], feat[-1] + (sum(feat[1:-1]) if axes else 0)


def _work(x, feat, codes, parameters, heads) -> Work:
    batch, rows, length = _queries(x, feat, heads, len(codes))
    inner, channels, context = parameters[2][0], x[2], parameters[5][1]
    tables = 2 * inner * context * length
    sides = prod(x[:2]) * inner * (channels + length) + feat[0] * x[1] * inner * (channels + length)
    if not codes:
        return Work(sides) + attention_work((feat[0], rows, length), feat, feat)
    return Work(tables + sides) + grid_attention_work((feat[0], rows, length), feat, inverted=False)


def _forward_outputs(x, feat, scale, mask, codes, parameters, heads, logit_scale, eps, dropout, seed):
    shared, rows, length = _queries(x.shape, feat.shape, heads, len(codes))
    batch, inner, channels = feat.shape[0], parameters[2].shape[0], x.shape[2]
    columns = padded_columns(x.shape[1], x.dtype)
    rest = 2 * inner * (padded(length, x.dtype) + 1) + columns * (shared * (channels + 1 + inner) + batch * inner)
    y, q, o = (x.new_empty(shape) for shape in ((batch, *x.shape[1:]), (shared, rows, length), (batch, rows, length)))
    lse, kept = x.new_empty((batch, rows), dtype=torch.float64), x.new_empty((batch, rows) if dropout > 0 else (0,))
    return y, q, o, lse, kept, x.new_empty(rest)


def _backward_outputs(d_y, x, feat, scale, mask, codes, parameters, *rest):
    return x.new_empty(x.shape), [p.new_empty(p.shape) for p in parameters]


def _sample(
    make, dtype=torch.float32, batch=2, shared=False, sizes=(5, 4), features=3, heads=2, inner=6, mask=False, mean=False,
    axes=True, drops=False,
):  # fmt: skip
    channels, widths = 7, [3] * len(sizes) * axes
    context = features - mean + sum(widths)
    shapes = (channels,), (channels,), (inner, channels), (context,), (context,), (2 * inner, context)
    parameters = [make(*shape, dtype=dtype) for shape in (*shapes, (channels, inner), (channels,))]
    x = make(1 if shared else batch, 4, channels, dtype=dtype)
    feat, scale = (
        make(batch, *sizes, features, dtype=dtype).detach(),
        make.positive(batch, *sizes, dtype=dtype).detach(),
    )
    codes = [make(size, width, dtype=dtype).detach() for size, width in zip(sizes, widths)]
    if not axes:
        feat, scale = feat * 0.1, None  # logits of any scale stay small
    tokens = feat, scale, make.mask(batch, *sizes) if mask else None, codes
    options = heads, 0.5, 1e-5, *((0.1, make.seed()) if drops else (0.0, None))
    return GridCrossAttentionFunction.apply(tokens, options, x, *parameters)


GRID_CROSS_ATTENTION = declare(
    OP,
    backends=CPU_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "grid_cross_attention_forward(Tensor x, Tensor feat, Tensor? scale, Tensor? mask, Tensor[] codes, "
            "Tensor[] parameters, int heads, float logit_scale, float eps, float dropout, Tensor? seed) "
            "-> (Tensor y, Tensor q, Tensor o, Tensor lse, Tensor kept, Tensor rest)",
            _forward_outputs,
            work=lambda x, feat, scale, mask, codes, parameters, heads, *_: _work(x, feat, codes, parameters, heads),
        ),
        Operator(
            "grid_cross_attention_backward(Tensor d_y, Tensor x, Tensor feat, Tensor? scale, Tensor? mask, "
            "Tensor[] codes, Tensor[] parameters, int heads, float logit_scale, float eps, float dropout, Tensor? seed, "
            "Tensor q, Tensor o, Tensor lse, Tensor kept, Tensor rest) -> (Tensor d_x, Tensor[] d_parameters)",
            _backward_outputs,
            work=lambda d_y, x, feat, scale, mask, codes, parameters, heads, *_: Work(
                2 * _work(x, feat, codes, parameters, heads).multiply_adds,
                _work(x, feat, codes, parameters, heads).exponentials,
            ),
        ),
    ),
    sample=_sample,
    variants=(
        {},
        dict(shared=True, mask=True),
        dict(dtype=torch.float64, sizes=(9,), features=1, heads=1),
        dict(batch=40),
        dict(mean=True),
        dict(drops=True),
        dict(axes=False, sizes=(9,), mask=True, heads=1),
    ),
)


def _forward(tokens, options, x, parameters) -> tuple[Tensor, ...]:
    """``y``, the dtype of x, and what else a forward makes, in the dtype that is computed in."""
    feat, scale, mask, codes = tokens
    compute = compute_dtype(x.dtype)
    wide, computed = (widened(each, compute) for each in ((x, feat), parameters))
    scale = None if scale is None else scale.to(compute)
    y, *made = torch.ops.perceiver_fast.grid_cross_attention_forward(
        *wide, scale, mask, widened(codes, compute), computed, *options
    )
    return y.to(x.dtype), *made


class GridCrossAttentionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs and what the forward makes beside y.

    ``tokens`` are feat, scale, mask and codes, which have no gradients; ``options`` heads, logit_scale, eps, dropout and its seed.
    """

    @staticmethod
    def forward(ctx, tokens, options, x, *parameters):
        feat, scale, mask, codes = tokens
        y, *made = _forward(tokens, options, x, parameters)
        ctx.save_for_backward(feat, scale, mask, *made, x, *parameters)
        ctx.codes, ctx.options = codes, options
        return y

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_y):
        feat, scale, mask, q, o, lse, kept, rest, x, *parameters = ctx.saved_tensors
        codes, options = ctx.codes, ctx.options

        def kernel():
            wide, computed = (widened(each, q.dtype) for each in ((d_y, x, feat), parameters))
            scales = None if scale is None else scale.to(q.dtype)
            d_x, d_parameters = torch.ops.perceiver_fast.grid_cross_attention_backward(
                *wide, scales, mask, widened(codes, q.dtype), computed, *options, q, o, lse, kept, rest
            )
            return narrowed((d_x, *d_parameters), x.dtype)

        if differentiated_again():

            def form(x, *parameters):
                with unless_autocast(x.device):
                    return reference.grid_cross_attention(x, feat, scale, mask, codes, parameters, *options)

            grads = differentiable(kernel, form, (x, *parameters), (d_y,), ctx.needs_input_grad[2:])
        else:
            grads = kernel()
        return None, None, *grads


def grid_cross_attention(
    x: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    codes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
) -> Tensor:
    """The latents with what they attend to added.

    Args:
        x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them; floating point.
        feat: raw channels ``[B, *sizes, F]``, at least one, the dtype of x; or ``[B, *sizes, F + 1]``, these less their mean
            and the mean, see :meth:`perceiver_fast.tokens.GridTokens.shifted`: to_kv's channels say which. Or, where scale is
            None, tokens of no axis ``[B, M, C]`` of mean 0 and variance 1. No gradient reaches it, scale or codes.
        scale: LayerNorm's scale of every token, ``[B, *sizes]``; or None, for tokens that are normalised.
        mask: bool ``[B, *sizes]``, True where a token may be attended to; or None. A row that is all False attends
            uniformly to all tokens.
        codes: of every axis, ``[n_a, C_a]``; none where scale is None.
        parameters: the latents' LayerNorm's weight and bias ``[D]``, to_q ``[H d, D]``, the tokens' LayerNorm's weight
            and bias ``[C]``, to_kv ``[2 H d, C]``, to_out ``[D, H d]`` and its bias ``[D]``.
        heads: number of heads, H.
        logit_scale: of the logits.
        eps: of the latents' LayerNorm, more than 0.
        dropout: probability of dropping an attention weight, by a seed that is drawn from torch's generator; not of tokens of
            no axis. Default: 0.

    Returns:
        ``[B, N, D]``, the dtype of x; half precision is computed in float32. Differentiable any number of times in x and the parameters.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import grid_cross_attention
        >>> x, feat, codes = torch.randn(2, 5, 8), torch.randn(2, 3, 4, 1), [torch.randn(3, 2), torch.randn(4, 2)]
        >>> shapes = (8,), (8,), (6, 8), (5,), (5,), (12, 5), (8, 6), (8,)
        >>> parameters = [torch.randn(shape) for shape in shapes]
        >>> grid_cross_attention(x, feat, torch.ones(2, 3, 4), None, codes, parameters, 2, 0.5, 1e-5).shape
        torch.Size([2, 5, 8])
    """
    _check(x, feat, scale, mask, codes, parameters, heads, eps)
    check_dropout(OP, dropout)
    if dropout > 0 and scale is None:
        raise ValueError(f"{OP}: expected no dropout where scale is None, got {dropout}; use latent_cross_attention")
    seed = dropout_seed(dropout, x.device)
    return grid_cross_attention_unchecked(
        x, feat, scale, mask, codes, parameters, heads, logit_scale, eps, dropout, seed
    )


@op_range(OP)
def grid_cross_attention_unchecked(
    x: Tensor,
    feat: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    codes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """:func:`grid_cross_attention` for callers whose tensors fit each other; they are not checked."""
    options = heads, logit_scale, eps, dropout, seed
    tokens = feat, scale, mask, codes
    if not runs_kernel(GRID_CROSS_ATTENTION, compute_dtype(x.dtype), x.device):
        return reference.grid_cross_attention(
            x, feat, scale, mask, codes, parameters, heads, logit_scale, eps, dropout, seed
        )
    if learns(x, *parameters):
        return GridCrossAttentionFunction.apply(tokens, options, x, *parameters)
    return _forward(tokens, options, x, parameters)[0]


def parameter_shapes(width: int, inner: int, channels: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the op's parameters, for latents of ``width`` channels, H d = ``inner``, and tokens of ``channels``."""
    norms = ((width,), (width,)), ((channels,), (channels,))
    return *norms[0], (inner, width), *norms[1], (2 * inner, channels), (width, inner), (width,)


def _check(x, feat, scale, mask, codes, parameters, heads, eps) -> None:
    named = {f"codes[{a}]": code for a, code in enumerate(codes)} | {
        f"parameters[{i}]": p for i, p in enumerate(parameters)
    }
    if scale is not None:
        named["scale"] = scale
    check_alike(OP, x=x, feat=feat, **named)
    if x.dim() != 3 or x.numel() == 0 or feat.dim() < 3 or feat.numel() == 0 or x.shape[0] not in (1, feat.shape[0]):
        raise ValueError(
            f"{OP}: expected latents x [B, N, D] or [1, N, D] and raw channels feat [B, *sizes, F], got "
            f"{tuple(x.shape)} and {tuple(feat.shape)}; give both the same batch"
        )
    sizes, width = feat.shape[1:-1] if scale is not None else (), x.shape[2]
    if scale is None and feat.dim() != 3:
        raise ValueError(
            f"{OP}: expected feat [B, M, C] of normalised tokens where scale is None, got {tuple(feat.shape)}; flatten its "
            "axes, or give scale and a code for every axis"
        )
    if len(codes) != len(sizes) or any(code.dim() != 2 for code in codes) or len(parameters) != 8:
        raise ValueError(
            f"{OP}: expected 8 parameters and codes [n, C] of {len(sizes)} axes, got {len(parameters)} and "
            f"{[tuple(code.shape) for code in codes]}; feat has an axis for every code"
        )
    for axis, (code, size) in enumerate(zip(codes, sizes)):
        check_shape(OP, f"codes[{axis}]", code, (size, code.shape[1]), "feat has so many places on that axis")
    inner = parameters[2].shape[0] if parameters[2].dim() else 0
    if heads < 1 or inner == 0 or inner % heads or not eps > 0:
        raise ValueError(
            f"{OP}: expected heads that divide {inner} channels and eps above 0, got {heads} and {eps}; to_q [H d, D] "
            "says how many there are"
        )
    channels = feat.shape[-1] + sum(code.shape[1] for code in codes)
    if scale is not None and feat.shape[-1] > 1 and parameters[5].shape[-1:] == (channels - 1,):
        channels -= 1  # the last of feat is the mean
    for i, (p, shape) in enumerate(zip(parameters, parameter_shapes(width, inner, channels))):
        check_shape(OP, f"parameters[{i}]", p, shape, "x, feat, codes and to_q say so")
    if scale is not None:
        check_shape(OP, "scale", scale, feat.shape[:-1], "give every token of feat one")
    check_mask(OP, mask, feat.shape[:-1], x, "x")
