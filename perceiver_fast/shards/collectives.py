"""The collectives of sharded tokens, differentiable: each is the other's derivative.

What all processes hold alike, latents and parameters, is *replicated*; what one of them computes from its own tokens is
*local*. With one loss that all processes compute alike,

    local(t)      replicated to local: the same numbers;   its gradient is the sum over the processes
    summed(t)     local to replicated: the sum;            its gradient is the same on every process

so gradients of parameters come out whole everywhere, those of one process, and no factor is left to anybody. (Megatron-LM
calls the two f and g: Shoeybi et al., 2019.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _all_reduced(group: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sums over the group, of all tensors in one message a dtype."""
    found: list[Tensor] = list(tensors)
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        at = [i for i, t in enumerate(tensors) if t.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in at])
        dist.all_reduce(flat, group=group)
        for i, part in zip(at, flat.split([tensors[i].numel() for i in at])):
            found[i] = part.view(tensors[i].shape)
    return tuple(found)


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        at = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        sums = dict(zip(at, summed(ctx.group, *(grads[i] for i in at))))
        return None, *(sums.get(i) for i in range(len(grads)))


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return _all_reduced(group, tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *local(ctx.group, *grads)


def local(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replicated tensors for local use: as they are; one message sums all their gradients over the group.

    Args:
        group: a process group of torch.distributed, all of whose processes call this with tensors of the same shapes.
        *tensors: any.
    """
    return _Local.apply(group, *tensors)


def summed(group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over the group of local tensors, which are replicated: in one message a dtype."""
    return _Summed.apply(group, *tensors)


def largest(group: Any, tensor: Tensor) -> Tensor:
    """The elementwise maximum over the group, without a gradient."""
    found = tensor.detach().clone()
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found
