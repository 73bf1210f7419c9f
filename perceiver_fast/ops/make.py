"""Tensors for an op's samples and trials."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Make:
    """Makes the tensors of a sample, and keeps those that gradients are asked for in ``leaves``.

    Args:
        device: where; on ``"meta"`` tensors have no content.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.leaves: list[Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normally distributed numbers of either sign, differentiable."""
        return self._leaf(torch.randn(*shape, device=self.device).to(dtype))

    def positive(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between a half and three halves, differentiable."""
        return self._leaf((torch.rand(*shape, device=self.device) + 0.5).to(dtype))

    def mask(self, *shape: int) -> Tensor:
        """A mask with True in two of three places."""
        return torch.rand(*shape, device=self.device) < 2 / 3

    def seed(self) -> Tensor:
        """Of dropout."""
        return torch.full((1,), 3, dtype=torch.int64, device=self.device)

    def _leaf(self, tensor: Tensor) -> Tensor:
        self.leaves.append(tensor.requires_grad_())
        return tensor


class Same(Make):
    """Makes the same numbers everywhere and every time, without torch's generators, which stay as they were.

    Args:
        device: where.
        exact: in float64, though rounded to the dtype that is asked for: what a result's error is measured from.
        tried: the backend that is on trial, for trials that hang on it. Default: any.
    """

    def __init__(self, device: torch.device | str, exact: bool = False, tried: str = ""):
        super().__init__(device)
        self.exact, self.tried = exact, tried
        self._made = 0

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._leaf(self.numbers(*shape, dtype=dtype))

    def positive(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._leaf(self._rounded(self._uniform(shape) + 0.5, dtype))

    def mask(self, *shape: int) -> Tensor:
        return (self._uniform(shape) < 2 / 3).to(self.device)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers of either sign, of mean zero and variance one."""
        return self._rounded((self._uniform(shape) - 0.5) * math.sqrt(12), dtype)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        self._made += 1
        at = torch.arange(math.prod(shape), dtype=torch.float64, device="cpu")
        return ((at * 12.9898 + self._made * 78.233).sin() * 43758.5453).frac().abs().view(shape)

    def _rounded(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        tensor = tensor.to(dtype)
        return (tensor.double() if self.exact else tensor).to(self.device)
