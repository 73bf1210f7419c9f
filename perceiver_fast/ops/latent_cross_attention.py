"""A few latents' cross-attention to keys and values that are given, in one call: LayerNorm, projections, residual.

    q = LayerNorm(x) to_q^T        y = x + softmax(scale q k^T) v to_out^T + to_out_bias        head by head

Keys and values are what a layer makes of its tokens, whatever these are. The calls from which
layers/cross_attention.py puts the same together cost a small model more than what they compute; and the gradients of keys
and values are written as the rows of one tensor, which is what their projection needs.
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
from perceiver_fast.ops.latent_layers import CPU_BACKENDS, packed_columns
from perceiver_fast.ops.library import compute_dtype, dropout_seed, learns, narrowed, unless_autocast, widened
from perceiver_fast.ops.pointwise import PointwiseCall, runs_kernel
from perceiver_fast.ops.work import Work
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import own

OP = "latent_cross_attention"
PARAMETERS = 5


def _work(x, keys_values) -> Work:
    batch, tokens, inner = keys_values[0], keys_values[1], keys_values[2] // 2
    sides = (prod(x[:2]) + batch * x[1]) * inner * x[2]
    pairs = batch * x[1] * tokens
    return Work(sides + 2 * pairs * inner)


def _exponentials(x, keys_values, heads) -> int:
    return keys_values[0] * x[1] * keys_values[1] * heads


def _forward_outputs(x, keys_values, mask, parameters, heads, *_):
    (shared, latents, channels), (batch, _, width) = x.shape, keys_values.shape
    q, o = (x.new_empty((each, heads, latents, width // 2 // heads)) for each in (shared, batch))
    rest = packed_columns(int(shared), int(latents), x.dtype) * (channels + 1)
    lse = x.new_empty((batch, heads, latents), dtype=torch.float64)
    return x.new_empty((batch, latents, channels)), q, o, lse, x.new_empty(rest)


def _backward_outputs(d_y, x, keys_values, mask, parameters, *_):
    return x.new_empty(x.shape), x.new_empty(keys_values.shape), [p.new_empty(p.shape) for p in parameters]


def _sample(
    make, dtype=torch.float32, batch=2, shared=False, tokens=9, heads=2, inner=6, mask=False, drops=False, adds=True
):
    channels = 7
    shapes = parameter_shapes(channels, inner)
    x = make(1 if shared else batch, 4, channels, dtype=dtype)
    keys_values = make(batch, tokens, 2 * inner, dtype=dtype) * 0.1  # logits of any scale stay small
    parameters = [make(*each, dtype=dtype) for each in shapes]
    options = heads, 0.1, 1e-5, *((0.1, make.seed()) if drops else (0.0, None)), adds
    return LatentCrossAttentionFunction.apply(
        make.mask(batch, tokens) if mask else None, options, x, keys_values, *parameters
    )


LATENT_CROSS_ATTENTION = declare(
    OP,
    backends=CPU_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "latent_cross_attention_forward(Tensor x, Tensor keys_values, Tensor? mask, Tensor[] parameters, int heads, "
            "float logit_scale, float eps, float dropout, Tensor? seed, bool adds) "
            "-> (Tensor y, Tensor q, Tensor o, Tensor lse, Tensor rest)",
            _forward_outputs,
            work=lambda x, keys_values, mask, parameters, heads, *_: Work(
                _work(x, keys_values).multiply_adds, _exponentials(x, keys_values, heads)
            ),
        ),
        Operator(
            "latent_cross_attention_backward(Tensor d_y, Tensor x, Tensor keys_values, Tensor? mask, Tensor[] parameters, "
            "int heads, float logit_scale, float eps, float dropout, Tensor? seed, bool adds, Tensor q, Tensor o, "
            "Tensor lse, Tensor rest) -> (Tensor d_x, Tensor d_keys_values, Tensor[] d_parameters)",
            _backward_outputs,
            work=lambda d_y, x, keys_values, mask, parameters, heads, *_: Work(
                5 * _work(x, keys_values).multiply_adds // 2, _exponentials(x, keys_values, heads)
            ),
        ),
    ),
    sample=_sample,
    variants=(
        {},
        dict(shared=True, mask=True),
        dict(dtype=torch.float64, tokens=1, heads=1, adds=False),
        dict(batch=40, drops=True),
    ),
)


def _forward(x, keys_values, mask, parameters, options) -> tuple[Tensor, ...]:
    """``y``, the dtype of x, and what else a forward makes, in the dtype that is computed in."""
    (x_wide, kv), computed = (widened(each, compute_dtype(x.dtype)) for each in ((x, keys_values), parameters))
    y, *made = torch.ops.perceiver_fast.latent_cross_attention_forward(x_wide, kv, mask, computed, *options)
    return y.to(x.dtype), *made


class LatentCrossAttentionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs and what the forward makes beside y.

    ``options`` are heads, logit_scale, eps, dropout, its seed, and whether x is added.
    """

    @staticmethod
    def forward(ctx, mask, options, x, keys_values, *parameters):
        y, *made = _forward(x, keys_values, mask, parameters, options)
        ctx.save_for_backward(mask, *made, x, keys_values, *parameters)
        ctx.options = options
        return y

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_y):
        mask, q, o, lse, rest, x, keys_values, *parameters = ctx.saved_tensors
        options = ctx.options

        def kernel():
            (d_wide, x_wide, kv), computed = (widened(each, q.dtype) for each in ((d_y, x, keys_values), parameters))
            d_x, d_kv, d_parameters = torch.ops.perceiver_fast.latent_cross_attention_backward(
                d_wide, x_wide, kv, mask, computed, *options, q, o, lse, rest
            )
            return *narrowed((d_x,), x.dtype), *narrowed((d_kv,), keys_values.dtype), *narrowed(d_parameters, x.dtype)

        if differentiated_again():

            def form(x, keys_values, *parameters):
                with unless_autocast(x.device):
                    wide = widened((keys_values,), x.dtype)
                    return reference.latent_cross_attention(x, *wide, mask, parameters, *options)

            grads = differentiable(kernel, form, (x, keys_values, *parameters), (d_y,), ctx.needs_input_grad[2:])
        else:
            grads = kernel()
        return None, None, *grads


def latent_cross_attention(
    x: Tensor,
    keys_values: Tensor,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
    adds: bool = True,
) -> Tensor:
    """The latents with what they attend to added, or that alone.

    Args:
        x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them; floating point.
        keys_values: keys and values of M tokens, ``[B, M, 2 H d]``, keys first, the dtype of x.
        mask: bool ``[B, M]``, True where a token may be attended to; or None. A row that is all False attends uniformly
            to all tokens.
        parameters: the latents' LayerNorm's weight and bias ``[D]``, to_q ``[H d, D]``, to_out ``[D, H d]`` and its bias
            ``[D]``.
        heads: number of heads, H.
        logit_scale: of the logits.
        eps: of the latents' LayerNorm, more than 0.
        dropout: probability of dropping an attention weight, by a seed that is drawn from torch's generator. Default: 0.
        adds: whether the latents are added. Default: True.

    Returns:
        ``[B, N, D]``, the dtype of x; half precision is computed in float32. Differentiable any number of times in x,
        keys_values and the parameters.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import latent_cross_attention
        >>> parameters = [torch.randn(shape) for shape in ((8,), (8,), (6, 8), (8, 6), (8,))]
        >>> latent_cross_attention(torch.randn(2, 5, 8), torch.randn(2, 30, 12), None, parameters, 2, 0.5, 1e-5).shape
        torch.Size([2, 5, 8])
    """
    _check(x, keys_values, mask, parameters, heads, eps, dropout)
    mask = None if mask is None else own(mask)  # it is saved, and its owner may refill it before the backward
    seed = dropout_seed(dropout, x.device)
    return latent_cross_attention_unchecked(
        x, keys_values, mask, parameters, heads, logit_scale, eps, dropout, seed, adds
    )


@op_range(OP)
def latent_cross_attention_unchecked(
    x: Tensor,
    keys_values: Tensor,
    mask: Tensor | None,
    parameters: Sequence[Tensor],
    heads: int,
    logit_scale: float,
    eps: float,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    adds: bool = True,
) -> Tensor:
    """:func:`latent_cross_attention` for callers whose tensors fit each other; they are not checked.

    ``keys_values`` may be of a wider dtype than x. ``seed`` is dropout's; ``mask`` is the callee's own.
    """
    options = heads, logit_scale, eps, dropout, seed, adds
    if not runs_kernel(LATENT_CROSS_ATTENTION, compute_dtype(x.dtype), x.device):
        return reference.latent_cross_attention(x, keys_values, mask, parameters, *options)
    if learns(x, keys_values, *parameters):
        return LatentCrossAttentionFunction.apply(mask, options, x, keys_values, *parameters)
    return _forward(x, keys_values, mask, parameters, options)[0]


def parameter_shapes(width: int, inner: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of the op's parameters, for latents of ``width`` channels and H d = ``inner``."""
    return (width,), (width,), (inner, width), (width, inner), (width,)


def _check(x, keys_values, mask, parameters, heads, eps, dropout) -> None:
    named = {f"parameters[{i}]": p for i, p in enumerate(parameters)}
    check_alike(OP, x=x, keys_values=keys_values, **named)
    shapes = tuple(x.shape), tuple(keys_values.shape)
    if any(len(shape) != 3 or 0 in shape for shape in shapes) or shapes[0][0] not in (1, shapes[1][0]):
        raise ValueError(
            f"{OP}: expected latents x [B, N, D] or [1, N, D] and keys_values [B, M, 2 H d], got {shapes[0]} and "
            f"{shapes[1]}; give both the same batch"
        )
    inner = shapes[1][2] // 2
    if heads < 1 or shapes[1][2] % (2 * heads) or not eps > 0 or len(parameters) != PARAMETERS:
        raise ValueError(
            f"{OP}: expected {PARAMETERS} parameters, heads that divide {inner} channels and eps above 0, got "
            f"{len(parameters)}, {heads} and {eps}; keys_values [B, M, 2 H d] says how many channels there are"
        )
    for i, (p, shape) in enumerate(zip(parameters, parameter_shapes(shapes[0][2], inner))):
        check_shape(OP, f"parameters[{i}]", p, shape, "x and keys_values say so")
    check_mask(OP, mask, shapes[1][:2], x, "x")
    check_dropout(OP, dropout)
