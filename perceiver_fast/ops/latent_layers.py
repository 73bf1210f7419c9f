"""A few latents through pre-normalised layers, self-attention and feed-forward, in one call.

    z = LayerNorm(x)

    attention      q = z to_q^T   [k, v] = z to_kv^T      x <- x + (softmax(scale q k^T) v) to_out^T + b, head by head
    feed-forward   h = z W1^T + b1                        x <- x + (geglu(h) W2^T + b2) noise

Dropout is of attention's weights, and of what a feed-forward adds: then there is noise.

The products of a small model take less time than the calls that ask for them. Here there is one call for all layers
between two cross-attentions, and the latents of some batch elements stay in cache from the first layer to the last. A
large product is faster on a library (ops/linear.py), whose calls then cost nothing to speak of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.ops.checks import check_alike, check_dropout, check_dtype, check_shape
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.library import compute_dtype, kernel_reasons, learns, narrowed, unless_autocast, widened
from perceiver_fast.ops.pointwise import PointwiseCall, runs_kernel
from perceiver_fast.ops.work import Work
from perceiver_fast.ranges import op_range

OP = "latent_layers"
PARAMETERS = 6  # of a layer
CPU_BACKENDS = (
    Backend("cpu", lambda c: kernel_reasons(extension.error, "cpu", c.device, c.dtype, (torch.float64, torch.float32))),
    Backend("reference", lambda c: []),
)
COLUMNS = 64  # of a chunk, csrc/core/latent_columns.h
AGAIN = 64  # channels of latents up to which what is between products is computed again, as csrc/core/latent_layers.cpp has it


def _work(x, parameters, heads) -> Work:
    """Products, and attention of a layer with heads; a feed-forward has as many exponentials as its width."""
    rows, latents, channels = prod(x[:2]), x[1], x[2]
    products = exponentials = 0
    for (_, inner), count in zip(parameters[4::PARAMETERS], heads):  # shapes of the last weights
        products += rows * inner * (4 * channels + 2 * latents if count else 3 * channels)
        exponentials += rows * (count * latents if count else inner)
    return Work(products, exponentials)


def padded(size: int, dtype: torch.dtype) -> int:
    """``size`` up to whole vectors of every instruction set, as csrc/core/latent_columns.h has it."""
    lanes = 64 // dtype.itemsize
    return -(-size // lanes) * lanes


def padded_columns(latents: int, dtype: torch.dtype) -> int:
    """Latents of an element as the kernel lays them out (csrc/core/latent_columns.h)."""
    columns = padded(latents, dtype)
    return columns + 64 // dtype.itemsize if columns * dtype.itemsize % 1024 == 0 else columns


@functools.cache
def packed_columns(batch: int, latents: int, dtype: torch.dtype) -> int:
    """Latents of a batch as the kernel lays them out, packed, chunk by chunk (csrc/core/latent_columns.h)."""
    group = max(COLUMNS // latents, 1)
    for elements in range(group + 1, 2 * COLUMNS // latents + 1):
        if padded(elements * latents, dtype) * group < padded(group * latents, dtype) * elements:
            group = elements
    chunks, rest = divmod(batch, min(group, batch))
    columns = chunks * padded_columns(min(group, batch) * latents, dtype)
    return columns + (padded_columns(rest * latents, dtype) if rest else 0)


def _saved(x, parameters, heads) -> int:
    """How many numbers a forward saves: every layer's normalised latents, and of wide ones what is between its products."""
    batch, latents, channels = x.shape
    numbers = 0
    for last, count in zip(parameters[4::PARAMETERS], heads):
        inner = last.shape[1]
        between = (4 if count else 2) * inner
        numbers += channels + 1 + (between if channels > AGAIN else 0)
    return packed_columns(int(batch), int(latents), x.dtype) * numbers


def _forward_outputs(x, parameters, heads, scales, eps, dropouts, drawn, saves):
    return x.new_empty(x.shape), x.new_empty(_saved(x, parameters, heads) if saves else 0)


def _backward_outputs(d_y, saved, parameters, *_):
    return d_y.new_empty(d_y.shape), [p.new_empty(p.shape) for p in parameters]


def _backward_work(d_y, saved, parameters, heads, *_) -> Work:
    forward = _work(d_y, parameters, heads)
    return Work(2 * forward.multiply_adds)


def _sample(
    make, dtype=torch.float32, heads=(0, 2, 0), batch=3, latents=5, channels=6, inner=4, drops=False, used_again=False
):
    x, parameters = make(batch, latents, channels, dtype=dtype), []
    for count in heads:
        first = ((inner, channels), (2 * inner, channels)) if count else ((2 * inner, channels), (2 * inner,))
        shapes = ((channels,), (channels,), *first, (channels, inner), (channels,))
        parameters += [make(*shape, dtype=dtype) for shape in shapes]
    layers = len(heads)
    drawn = [make.seed() if count else make(*x.shape, dtype=dtype).detach() for count in heads if drops]
    options = heads, (0.5,) * layers, (1e-5,) * layers, (0.1,) * len(drawn), drawn
    made = LatentLayersFunction.apply(options, used_again, x, *parameters)
    return (made[0], *(p * p for p in made[1:])) if used_again else made


LATENT_LAYERS = declare(
    OP,
    backends=CPU_BACKENDS,
    call=PointwiseCall,
    operators=(
        Operator(
            "latent_layers_forward(Tensor x, Tensor[] parameters, int[] heads, float[] scales, float[] eps, "
            "float[] dropouts, Tensor[] drawn, bool saves) "
            "-> (Tensor y, Tensor saved)",
            _forward_outputs,
            work=lambda x, parameters, heads, *_: _work(x, parameters, heads),
        ),
        Operator(
            "latent_layers_backward(Tensor d_y, Tensor saved, Tensor[] parameters, int[] heads, float[] scales, "
            "float[] eps, float[] dropouts, Tensor[] drawn, Tensor[] added) -> (Tensor d_x, Tensor[] d_parameters)",
            _backward_outputs,
            work=_backward_work,
        ),
    ),
    sample=_sample,
    variants=(
        {},
        dict(dtype=torch.float64, heads=(1,), batch=1, latents=1, channels=17),
        dict(heads=(0,), batch=20),
        dict(drops=True),
        dict(used_again=True),
    ),
)


def _forward(x, parameters, layers, saves: bool) -> tuple[Tensor, Tensor]:
    """``y``, the dtype of x, and what is saved, in the dtype that is computed in."""
    *rest, drawn = layers
    wide, computed, drawn = (widened(each, compute_dtype(x.dtype)) for each in ([x], parameters, drawn))
    y, saved = torch.ops.perceiver_fast.latent_layers_forward(*wide, computed, *rest, drawn, saves)
    return y.to(x.dtype), saved


class LatentLayersFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves x, the parameters, and what the forward saves.

    ``layers`` are heads, scales, eps, dropouts and drawn, which has no gradient. ``again``: the parameters are returned, too,
    for another use of the layers, whose gradients are added to this one's.
    """

    @staticmethod
    def forward(ctx, layers, again, x, *parameters):
        y, saved = _forward(x, parameters, layers, True)
        *ctx.layers, drawn = layers
        ctx.save_for_backward(saved, x, *drawn, *parameters)
        ctx.drawn = len(drawn)
        ctx.set_materialize_grads(False)
        if not again:
            return y
        returned = [p.detach() for p in parameters]
        ctx.mark_non_differentiable(*(r for r, p in zip(returned, parameters) if not p.requires_grad))
        return y, *returned

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_y, *d_returned):
        if d_y is None:  # nothing of what was saved is needed
            return None, None, None, *(d_returned or [None] * (len(ctx.needs_input_grad) - 3))
        saved, x, *parameters = ctx.saved_tensors
        drawn, parameters = parameters[: ctx.drawn], parameters[ctx.drawn :]
        layers = *ctx.layers, drawn

        def kernel(added=()):
            wide, computed, given, more = (widened(each, saved.dtype) for each in ([d_y], parameters, drawn, added))
            d_x, d_parameters = torch.ops.perceiver_fast.latent_layers_backward(
                *wide, saved, computed, *ctx.layers, given, more
            )
            return narrowed((d_x, *d_parameters), x.dtype)

        if differentiated_again():

            def form(x, *parameters):
                with unless_autocast(x.device):
                    return reference.latent_layers(x, parameters, *layers)

            d_x, *own = differentiable(kernel, form, (x, *parameters), (d_y,), ctx.needs_input_grad[2:])
            return None, None, d_x, *_sums(own, d_returned)
        if all(d is None for d in d_returned):
            return None, None, *kernel()
        return None, None, *kernel([torch.zeros_like(p) if d is None else d for d, p in zip(d_returned, parameters)])


def _sums(own, more):
    """Gradients and those of another use, where there are any."""
    if not more:
        return own
    return [a if b is None else b if a is None else a + b for a, b in zip(own, more)]


def latent_layers(
    x: Tensor,
    parameters: Sequence[Tensor],
    heads: Sequence[int],
    scales: Sequence[float],
    eps: Sequence[float],
    dropouts: Sequence[float] = (),
    drawn: Sequence[Tensor] = (),
) -> Tensor:
    """Layers one after the other, each added to the latents that it takes.

    Args:
        x: ``[B, N, D]``, floating point, not empty.
        parameters: six a layer, of the dtype of x: LayerNorm's weight ``[D]`` and bias ``[D]``; of attention to_q
            ``[I, D]`` and to_kv ``[2 I, D]``, of a feed-forward its weight ``[2 I, D]``, values then gates, and bias
            ``[2 I]``; the last projection's weight ``[D, I]`` and bias ``[D]``.
        heads: of every layer, a divisor of its I; 0 for a feed-forward.
        scales: of every layer's logits.
        eps: of every layer's LayerNorm, more than 0.
        dropouts: of every layer, the share that is dropped: of attention its weights, of a feed-forward what it adds.
            Default: none.
        drawn: of every layer, what decides which are dropped, or an empty tensor where dropouts has 0. Of attention a seed,
            int64 of one number; of a feed-forward what its result is multiplied with, ``[B, N, D]`` of the dtype of x. No
            gradient reaches it. Default: none.

    Returns:
        ``[B, N, D]``, the dtype of x; half precision is computed in float32. Differentiable any number of times in x and
        the parameters.

    Raises:
        TypeError, ValueError: wrong dtype, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import latent_layers
        >>> shapes = (8,), (8,), (12, 8), (24, 8), (8, 12), (8,)
        >>> latent_layers(torch.randn(2, 5, 8), [torch.randn(shape) for shape in shapes], [3], [0.5], [1e-5]).shape
        torch.Size([2, 5, 8])
    """
    _check(x, parameters, heads, scales, eps, dropouts, drawn)
    return latent_layers_unchecked(x, parameters, heads, scales, eps, dropouts, drawn)


@op_range(OP)
def latent_layers_unchecked(
    x: Tensor,
    parameters: Sequence[Tensor],
    heads: Sequence[int],
    scales: Sequence[float],
    eps: Sequence[float],
    dropouts: Sequence[float] = (),
    drawn: Sequence[Tensor] = (),
) -> Tensor:
    """:func:`latent_layers` for callers whose tensors fit each other; they are not checked."""
    layers = heads, scales, eps, dropouts, drawn
    if not runs_kernel(LATENT_LAYERS, compute_dtype(x.dtype), x.device):
        return reference.latent_layers(x, parameters, *layers)
    if learns(x, *parameters):
        return LatentLayersFunction.apply(layers, False, x, *parameters)
    return _forward(x, parameters, layers, False)[0]


@op_range(OP)
def latent_layers_again(
    x: Tensor,
    parameters: Sequence[Tensor],
    heads: Sequence[int],
    scales: Sequence[float],
    eps: Sequence[float],
    dropouts: Sequence[float] = (),
    drawn: Sequence[Tensor] = (),
) -> tuple[Tensor, Sequence[Tensor]]:
    """:func:`latent_layers_unchecked`, and the parameters for another use of the layers.

    Gradients of that one are then added up by this one's backward, not by autograd.
    """
    if not learns(x, *parameters) or not runs_kernel(LATENT_LAYERS, compute_dtype(x.dtype), x.device):
        return latent_layers_unchecked(x, parameters, heads, scales, eps, dropouts, drawn), parameters
    y, *returned = LatentLayersFunction.apply((heads, scales, eps, dropouts, drawn), True, x, *parameters)
    return y, returned


def _check(x, parameters, heads, scales, eps, dropouts, drawn) -> None:
    check_alike(OP, x=x, **{f"parameters[{i}]": p for i, p in enumerate(parameters)})
    if x.dim() != 3 or x.numel() == 0:
        raise ValueError(f"{OP}: expected latents x [B, N, D], got {tuple(x.shape)}; add the batch dimension")
    if len(parameters) != PARAMETERS * len(heads) or len(scales) != len(heads) or len(eps) != len(heads):
        raise ValueError(
            f"{OP}: expected {PARAMETERS} parameters, a scale and an eps for each of {len(heads)} heads, got "
            f"{len(parameters)}, {len(scales)} and {len(eps)}; give a 0 in heads for a feed-forward"
        )
    for layer, (count, epsilon) in enumerate(zip(heads, eps)):
        own, width = parameters[PARAMETERS * layer : PARAMETERS * (layer + 1)], x.shape[2]
        inner = own[4].shape[-1] if own[4].dim() else 0
        if count < 0 or inner == 0 or (count > 0 and inner % count) or not epsilon > 0:
            raise ValueError(
                f"{OP}: expected heads that divide {inner} channels and eps above 0, got {count} and {epsilon}; "
                "the last weight [D, I] says how many there are"
            )
        first = ((inner, width), (2 * inner, width)) if count else ((2 * inner, width), (2 * inner,))
        for i, (p, shape) in enumerate(zip(own, ((width,), (width,), *first, (width, inner), (width,)))):
            check_shape(
                OP, f"parameters[{PARAMETERS * layer + i}]", p, shape, f"x and the last weight of layer {layer} say so"
            )
    if len(dropouts) not in (0, len(heads)) or len(drawn) != len(dropouts):
        raise ValueError(
            f"{OP}: expected dropouts and drawn of none or of all {len(heads)} layers, got {len(dropouts)} and {len(drawn)}; "
            "give a layer without dropout a 0 and an empty tensor"
        )
    for layer, (count, dropout, each) in enumerate(zip(heads, dropouts, drawn)):
        name = f"drawn[{layer}]"
        if count > 0:
            check_dropout(OP, dropout)
        if dropout > 0 and count > 0:
            check_dtype(OP, name, each, (torch.int64,), "it is a seed")
            check_shape(OP, name, each, (1,), "give attention one seed")
        elif dropout > 0:
            check_alike(OP, x=x, **{name: each})
            check_shape(OP, name, each, tuple(x.shape), "every number that is added has its own")
