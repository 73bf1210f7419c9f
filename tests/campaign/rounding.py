"""A softmax whose derivative is rounded as that of fused attention is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor


class RoundedSoftmax(torch.autograd.Function):
    """A softmax whose derivative is rounded as that of fused attention is.

    Every fused attention subtracts ``sum(o dO)``, rounded, from the derivatives of the weights, where torch's softmax
    subtracts their own sum ``sum(P dP)``. Of a saturated softmax, only the latter leaves exact zeros.
    """

    @staticmethod
    def forward(ctx, logits, dim):
        weights = torch.softmax(logits, dim)
        ctx.save_for_backward(weights)
        ctx.dim = dim
        return weights

    @staticmethod
    def backward(ctx, d_weights):
        (weights,) = ctx.saved_tensors
        terms = weights * d_weights
        rounding = torch.finfo(terms.dtype).eps * terms.abs().sum(ctx.dim, keepdim=True)
        total = terms.sum(ctx.dim, keepdim=True) + rounding * (2 * torch.rand_like(rounding) - 1)
        return weights * (d_weights - total), None


@contextmanager
def rounded_softmax(seed: int) -> Iterator[None]:
    """Within it, ``Tensor.softmax`` is :class:`RoundedSoftmax` where gradients flow."""
    plain = torch.Tensor.softmax

    def softmax(logits: Tensor, dim: int, *args, **kwargs) -> Tensor:
        if args or kwargs or not logits.requires_grad:
            return plain(logits, dim, *args, **kwargs)
        return RoundedSoftmax.apply(logits, dim)

    with torch.random.fork_rng([]), mock.patch("torch.Tensor.softmax", softmax):
        torch.manual_seed(seed)
        yield
