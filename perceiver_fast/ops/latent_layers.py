"""A few latents through pre-normalised layers, self-attention and feed-forward, in one call.

    z = LayerNorm(x)

    attention      q = z to_q^T   [k, v] = z to_kv^T      made = softmax(scale q k^T) v, head by head
    feed-forward   h = z W1^T + b1                        made = geglu(h)

    x <- x + made last^T + last_bias

The products of a small model take less time than the calls that ask for them. Here there is one call for all layers
between two cross-attentions, and the latents of some batch elements stay in cache from the first layer to the last. A
large product is faster on a library (ops/linear.py), whose calls then cost nothing to speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again
from perceiver_fast.ops.library import cpu_error, kernel_reasons, learns
from perceiver_fast.ops.work import Work
from perceiver_fast.ranges import op_range

OP = "latent_layers"
PARAMETERS = 6  # of a layer
AGAIN = 64  # channels of latents up to which what is between products is computed again, as csrc/core/latent_layers.cpp has it
COLUMNS = 64  # latents that are computed with together, as csrc/core/latent_columns.h has it


@dataclass(frozen=True)
class LatentLayersCall:
    """What the choice of a backend may depend on."""

    dtype: torch.dtype
    device: torch.device


def _inner(parameters, layer: int) -> int:
    """Channels of all heads of a layer together, or the width of a feed-forward."""
    return parameters[PARAMETERS * layer + 4].shape[1]


def _work(x, parameters, heads) -> Work:
    """Products, and attention of a layer with heads; a feed-forward has as many exponentials as its width."""
    rows, latents, channels = prod(x[:2]), x[1], x[2]
    products = exponentials = 0
    for layer, count in enumerate(heads):
        inner = _inner(parameters, layer)
        products += rows * inner * (4 * channels + 2 * latents if count else 3 * channels)
        exponentials += rows * (count * latents if count else inner)
    return Work(products, exponentials)


def padded_columns(shape: Sequence[int], lanes: int) -> int:
    """Columns of latents ``[B, N, D]`` in chunks, as csrc/core/latent_columns.h pads them to whole vectors."""
    padded = -(-shape[1] // lanes) * lanes
    group = max(1, min(shape[0], COLUMNS // padded))
    return -(-shape[0] // group) * group * padded


def _saved(x, parameters, heads) -> int:
    """How many numbers a forward saves: every layer's normalised latents, and of wide ones what is between its products."""
    latents, channels = x.shape[1:]
    numbers = 0
    for layer, count in enumerate(heads):
        inner = _inner(parameters, layer)
        between = 4 * inner + count * latents if count else 2 * inner
        numbers += channels + 1 + (between if channels > AGAIN else 0)
    return padded_columns(x.shape, 64 // x.element_size()) * numbers


def _forward_outputs(x, parameters, heads, scales, eps, saves):
    return x.new_empty(x.shape), x.new_empty(_saved(x, parameters, heads) if saves else 0)


def _backward_outputs(d_y, saved, parameters, heads, scales, eps):
    return d_y.new_empty(d_y.shape), [p.new_empty(p.shape) for p in parameters]


def _backward_work(d_y, saved, parameters, heads, scales, eps) -> Work:
    forward = _work(d_y, parameters, heads)
    return Work(2 * forward.multiply_adds)


def _sample(make, dtype=torch.float32, heads=(0, 2, 0), batch=3, latents=5, channels=6, inner=4):
    x, parameters = make(batch, latents, channels, dtype=dtype), []
    for count in heads:
        first = ((inner, channels), (2 * inner, channels)) if count else ((2 * inner, channels), (2 * inner,))
        shapes = ((channels,), (channels,), *first, (channels, inner), (channels,))
        parameters += [make(*shape, dtype=dtype) for shape in shapes]
    layers = len(heads)
    return LatentLayersFunction.apply(heads, (0.5,) * layers, (1e-5,) * layers, x, *parameters)


LATENT_LAYERS = declare(
    OP,
    backends=(
        Backend(
            "cpu",
            lambda call: kernel_reasons(
                cpu_error(extension.error), "cpu", call.device, call.dtype, (torch.float64, torch.float32)
            ),
        ),
        Backend("reference", lambda call: []),
    ),
    call=LatentLayersCall,
    operators=(
        Operator(
            "latent_layers_forward(Tensor x, Tensor[] parameters, int[] heads, float[] scales, float[] eps, bool saves) "
            "-> (Tensor y, Tensor saved)",
            _forward_outputs,
            work=lambda x, parameters, heads, *_: _work(x, parameters, heads),
        ),
        Operator(
            "latent_layers_backward(Tensor d_y, Tensor saved, Tensor[] parameters, int[] heads, float[] scales, "
            "float[] eps) -> (Tensor d_x, Tensor[] d_parameters)",
            _backward_outputs,
            work=_backward_work,
        ),
    ),
    sample=_sample,
    variants=({}, dict(dtype=torch.float64, heads=(1,), batch=1, latents=1, channels=17), dict(heads=(0,), batch=20)),
)


class LatentLayersFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves x, the parameters, and what the forward saves."""

    @staticmethod
    def forward(ctx, heads, scales, eps, x, *parameters):
        y, saved = torch.ops.perceiver_fast.latent_layers_forward(x, parameters, heads, scales, eps, True)
        ctx.save_for_backward(saved, x, *parameters)
        ctx.layers = heads, scales, eps
        return y

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_y):
        saved, x, *parameters = ctx.saved_tensors
        layers = ctx.layers

        def kernel():
            d_x, d_parameters = torch.ops.perceiver_fast.latent_layers_backward(d_y, saved, parameters, *layers)
            return d_x, *d_parameters

        if differentiated_again():

            def form(x, *parameters):
                return reference.latent_layers(x, parameters, *layers)

            grads = differentiable(kernel, form, (x, *parameters), (d_y,), ctx.needs_input_grad[3:])
        else:
            grads = kernel()
        return None, None, None, *grads


@op_range(OP)
def latent_layers(
    x: Tensor, parameters: Sequence[Tensor], heads: Sequence[int], scales: Sequence[float], eps: Sequence[float]
) -> Tensor:
    """Layers one after the other, each added to the stream that it takes; shapes are checked by the kernels alone.

    Args:
        x: ``[B, N, D]``, float32 or float64, not empty.
        parameters: six a layer, of the dtype of x: LayerNorm's weight ``[D]`` and bias ``[D]``; of attention to_q
            ``[I, D]``, to_kv ``[2 I, D]``, of a feed-forward the weight ``[2 I, D]``, values then gates, and its bias
            ``[2 I]``; and the last projection's weight ``[D, I]`` and bias ``[D]``.
        heads: of every layer; 0 for a feed-forward.
        scales: of every layer's logits.
        eps: of every layer's LayerNorm, more than 0.

    Returns:
        ``[B, N, D]``. Differentiable any number of times in x and the parameters.

    Raises:
        RuntimeError: a size or dtype does not fit.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.latent_layers import latent_layers
        >>> shapes = (8,), (8,), (12, 8), (24, 8), (8, 12), (8,)
        >>> latent_layers(torch.randn(2, 5, 8), [torch.randn(shape) for shape in shapes], [3], [0.5], [1e-5]).shape
        torch.Size([2, 5, 8])
    """
    if learns(x, *parameters):
        return LatentLayersFunction.apply(heads, scales, eps, x, *parameters)
    return torch.ops.perceiver_fast.latent_layers_forward(x, parameters, heads, scales, eps, False)[0]
