"""What goes on around a call: graphs traced from it, gradients recorded, modes that see its operators one by one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

ANY_SIZE = 4096  # stands in for a number of tokens that is not known

# Types of plain tensors. On a subclass (quantized, sharded, of masked values) an operator may mean something else.
PLAIN = (Tensor, nn.Parameter)


def intercepted() -> bool:
    """Whether somebody sees torch's operators one by one: a dispatch mode (explain's, a FLOP counter), or torch.jit.trace.

    They know torch's own operators, so nothing may then run past torch's dispatcher, and no value computed earlier may
    be used in the place of operators.
    """
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def exports_onnx() -> bool:
    """Whether a graph is being traced for ONNX, which has torch's operators but none of this package's."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result would set it; but calling that imports torch._dynamo, which takes seconds.
setattr(exports_onnx, "_dynamo_marked_constant", True)


def known(size: int, axes: int = 1) -> int:
    """``size``, or a usual one where a graph for any size is being traced: a comparison would tie the graph to some sizes.

    Args:
        size: a number of tokens, or of places on one of ``axes`` axes, which then are ANY_SIZE tokens together.
    """
    if torch.compiler.is_exporting() and (torch.compiler.is_dynamo_compiling() or type(size) is not int):
        return round(ANY_SIZE ** (1 / axes))
    return size


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate: under torch.compile the function runs as it is, between two graphs.

    torch.compiler.disable does that, but imports torch._dynamo, which takes seconds: so it is used once that is there.
    """
    disabled: list[Callable[P, T]] = []

    @wraps(function)
    def call(*args: P.args, **keywords: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **keywords)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **keywords)

    setattr(call, "_torchdynamo_disable", True)  # a graph ends where it is called
    eval_frame = getattr(torch._C._dynamo, "eval_frame", None)
    if hasattr(eval_frame, "skip_code"):  # and it is not traced by itself
        eval_frame.skip_code(getattr(call, "__code__"))  # type: ignore[union-attr]
    return call


def own(tensor: Tensor) -> Tensor:
    """A copy of an input where gradients are recorded, else the input itself.

    The backward needs what the forward saw, and the caller may refill the input in between. (perceiver-pytorch copies
    its input, too, when it joins the position codes to it.) The copy of an inference tensor can be trained on.
    """
    traced = torch._C._get_tracing_state() is not None  # torch.jit.trace compares a run with gradients to one without
    return tensor.clone() if torch.is_grad_enabled() and not traced else tensor


def trainable(tensor: Tensor) -> Tensor:
    """``tensor``; or a copy, if it is an inference tensor and gradients are recorded: autograd cannot save those."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor
