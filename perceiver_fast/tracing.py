"""How a call is recorded: exported or traced as a graph, or with gradients."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

ANY_SIZE = 4096  # in the place of a size that is not known


def exports_onnx() -> bool:
    """Whether a graph is traced for ONNX, which knows torch's operators alone."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result sets; that function imports torch._dynamo, which takes seconds.
exports_onnx._dynamo_marked_constant = True


def known(size: int) -> int:
    """``size``, or a number in its place where a graph for any size is traced: comparing would tie the graph to some."""
    if torch.compiler.is_exporting() and (torch.compiler.is_dynamo_compiling() or type(size) is not int):
        return ANY_SIZE
    return size


def own(tensor: Tensor) -> Tensor:
    """A copy where gradients are recorded: it is kept for the backward, and the caller may refill its own meanwhile.

    perceiver-pytorch copies its input too, as it joins the encoding to it. Inference tensors become ones to train on.
    """
    traced = torch._C._get_tracing_state() is not None  # a trace is made with gradients and compared with one without
    return tensor.clone() if torch.is_grad_enabled() and not traced else tensor


def trainable(tensor: Tensor) -> Tensor:
    """A copy of an inference tensor where gradients are recorded, which cannot keep it for the backward; else ``tensor``."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor
