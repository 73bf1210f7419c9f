"""Derivatives of every order: what stands in for kernels where one derivative is not all that is asked for.

Kernels compute an op and its gradient. The gradient's own derivatives (``create_graph=True``), torch.func's transforms
and forward-mode derivatives take the op's differentiable form instead: plain PyTorch, in blocks of tokens that are each
computed again in the backward (:class:`Recomputed`), so that memory stays bounded there too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from perceiver_fast.ops.library import unless_autocast

SMALL = 2**16  # elements: what is smaller is saved rather than computed again
_innermost_transform = torch._C._functorch.peek_interpreter_stack


def transformed() -> bool:
    """Whether a torch.func transform or a forward-mode level is open: then ops take their differentiable forms.

    A compiler's tracing is none: it knows its own way through ops.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.derivatives import transformed
        >>> transformed(), torch.func.vmap(lambda x: x + transformed())(torch.zeros(2))
        (False, tensor([1., 1.]))
    """
    if torch.compiler.is_compiling():
        return False
    return _innermost_transform() is not None or forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Asked in a backward: whether its result will be differentiated too, or is batched by a transform."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed())


def gradients(
    function: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients by ``inputs`` of ``function(*inputs)``, for a backward; differentiable again if gradients are recorded.

    Args:
        function: a function of tensors made of differentiable operators. Its tensors beside the inputs are constants.
        inputs: its arguments, tensors or None.
        grads: one per output; None where no gradient came in.
        needed: whether an input's gradient is asked for.

    Returns:
        One per input; None where it is not needed, or is zero because nothing depends on it.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.derivatives import gradients
        >>> gradients(torch.mul, (torch.tensor(2.0), torch.tensor(3.0)), [torch.tensor(1.0)], (True, False))
        (tensor(3.), None)
    """
    recorded = torch.is_grad_enabled()
    found: list[Tensor | None] = [None] * len(inputs)
    wanted = [(i, t) for i, t in enumerate(inputs) if t is not None and needed[i]]
    with torch.enable_grad(), _unless_autocast(inputs):
        arguments = list(inputs)
        by = []
        for i, t in wanted:  # views, so that no input is in another's history: gradients are by each alone
            view = t.view_as(t)
            by.append(view if view.requires_grad else view.requires_grad_())
            arguments[i] = by[-1]
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads) if g is not None and o is not None and o.requires_grad]
        if pairs and wanted:
            outs, weights = zip(*pairs)
            result = torch.autograd.grad(outs, by, weights, create_graph=recorded, allow_unused=True)
            for (i, _), grad in zip(wanted, result):
                found[i] = grad
    return tuple(found)


def differentiable(
    kernel: Callable[[], tuple[Tensor | None, ...]],
    function: Callable[..., Tensor | tuple[Tensor | None, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What a kernel's backward returns where its result is differentiated again: see :func:`differentiated_again`.

    The gradients are the kernel's, their derivatives those of the differentiable form; batched by a transform, both are.

    Args:
        kernel: computes the gradients, one per input.
        function, inputs, grads, needed: see :func:`gradients`.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.derivatives import differentiable
        >>> x, one = torch.tensor(2.0, requires_grad=True), torch.tensor(1.0)
        >>> (first,) = differentiable(lambda: (3 * x.detach() ** 2,), lambda x: x**3, (x,), (one,), (True,))
        >>> first.item(), torch.autograd.grad(first, x)
        (12.0, (tensor(12.),))
    """
    if transformed():
        return gradients(function, inputs, grads, needed)
    return _KernelGradients.apply(kernel, function, tuple(needed), len(grads), *grads, *inputs)


class _KernelGradients(torch.autograd.Function):
    """A kernel's gradients as a function of the op's inputs and of the gradients that came in; keeps only these."""

    @staticmethod
    def forward(ctx, kernel, function, needed, count, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.options = function, needed, count
        found = kernel()
        return tuple(grad if need else None for grad, need in zip(found, needed))

    @staticmethod
    def backward(ctx, *grads):
        function, needed, count = ctx.options

        def first(*tensors):
            return gradients(function, tensors[count:], tensors[:count], needed)

        return None, None, None, None, *gradients(first, ctx.saved_tensors, grads, ctx.needs_input_grad[4:])


def recomputed(function: Callable, size: int, *inputs: Tensor | None) -> Any:
    """``function(*inputs)``; as :class:`Recomputed` where the largest tensor in it has more than a few elements."""
    return Recomputed.apply(function, *inputs) if size > SMALL else function(*inputs)


class Recomputed(torch.autograd.Function):
    """``Recomputed.apply(function, *inputs)`` is ``function(*inputs)``, of which only the inputs are saved.

    It has derivatives of every order, forward and reverse, and torch.func's transforms: they compute the function again.

    Args:
        function: a pure function of tensors, made of differentiable operators; returns a tensor or a tuple of them.
            All tensors that it needs are inputs; options are closed over.
        inputs: tensors or None. Those that are not floating point have no gradient.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.derivatives import Recomputed
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> (first,) = torch.autograd.grad(Recomputed.apply(lambda t: t.sin().exp(), x), x, create_graph=True)
        >>> first.requires_grad
        True
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *inputs):
        with _unless_autocast(inputs):  # a backward may run inside autocast, where the forward did not
            return function(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        function, needed = ctx.function, ctx.needs_input_grad[1:]
        wanted = [i for i, t in enumerate(inputs) if t is not None and needed[i] and t.is_floating_point()]
        if not wanted:
            return (None,) * (1 + len(inputs))
        count = len(grads)

        def pullback(*arguments):
            grads, tensors = arguments[:count], arguments[count:]
            outputs, vjp = torch.func.vjp(_of(function, tensors, wanted), *(tensors[i] for i in wanted))
            return vjp(grads if isinstance(outputs, tuple) else grads[0])

        found = Recomputed.apply(pullback, *grads, *inputs)
        result: list[Tensor | None] = [None] * len(inputs)
        for i, grad in zip(wanted, found):
            result[i] = grad
        return None, *result

    @staticmethod
    def jvp(ctx, _, *tangents):
        inputs, function = ctx.saved_tensors, ctx.function
        moving = [i for i, t in enumerate(tangents) if t is not None and inputs[i].is_floating_point()]
        count = len(moving)

        def pushforward(*arguments):
            tangents, tensors = arguments[:count], arguments[count:]
            primals = tuple(tensors[i] for i in moving)
            return _jvp(_of(function, tensors, moving), primals, tangents)

        return Recomputed.apply(pushforward, *(tangents[i] for i in moving), *inputs)


def _unless_autocast(tensors: Sequence[Tensor | None]) -> AbstractContextManager:
    return next((unless_autocast(t.device) for t in tensors if t is not None), nullcontext())


def _jvp(function: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]):
    """:func:`torch.func.jvp`'s second result; beside a level of torch.autograd.forward_ad, too, which it cannot nest in."""
    if forward_ad._current_level < 0 or eager_transforms.JVP_NESTING > 0:
        return torch.func.jvp(function, primals, tangents)[1]
    linearized: Any = torch.func.vjp(function, *primals)  # linear in the cotangents: its own vjp is the jvp
    outputs, vjp = linearized

    def transposed(*weights):
        return vjp(weights if isinstance(outputs, tuple) else weights[0])

    zeros = [torch.zeros_like(o) for o in (outputs if isinstance(outputs, tuple) else (outputs,))]
    transposed_again: Any = torch.func.vjp(transposed, *zeros)[1]
    found = transposed_again(tangents)
    return found if isinstance(outputs, tuple) else found[0]


def _of(function: Callable, tensors: Sequence[Tensor | None], places: Sequence[int]) -> Callable:
    """``function`` as one of the tensors at some places; the others are constants."""

    def restricted(*changing):
        arguments = list(tensors)
        for i, t in zip(places, changing):
            arguments[i] = t
        return function(*arguments)

    return restricted
