"""The residual stream: latents that branches join, each after a LayerNorm of what the ones before it made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from perceiver_fast.cache import PLAIN, Cached
from perceiver_fast.ops.layer_norm import run_layer_norm
from perceiver_fast.ops.linear import product_dtype

_STAND_INS = (*PLAIN, FakeTensor)  # a parameter without content stands for a plain one, where explain looks on


def is_called(module: nn.Module) -> bool:
    """Whether something waits for a call of ``module``: a hook, or a forward put on the instance (accelerate does)."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return "forward" in module.__dict__


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether ``module`` is a ``kind`` and nothing more, so that an op on its parameters can stand in for a call of it.

    Hooks, parametrizations, adapters and quantized weights make it something more.
    """
    if type(module) is not kind or is_called(module):
        return False
    parameters = module._parameters  # nn.Module.__getattr__ is slow, and this is asked several times a layer
    bias = parameters.get("bias")
    return type(parameters.get("weight")) in _STAND_INS and (bias is None or type(bias) in _STAND_INS)


def _fits(norm: nn.Module, x: Tensor) -> bool:
    """Whether the op can stand in for ``norm``; tokens that autocast made half precision meet float32 parameters."""
    return is_plain(norm, nn.LayerNorm) and norm.bias is not None and norm.weight.dtype == x.dtype


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype that products of it are computed in."""
    if not _fits(norm, x):
        return norm(x)
    return run_layer_norm(x, None, None, norm.weight, norm.bias, norm.eps, product_dtype(x))[1]


class ResidualStream:
    """Latents ``[B, N, D]`` on their way through pre-normalised layers.

    A branch waits until the next layer asks for the normalised stream: adding it, its bias and normalising are then one
    op. Layers called with a stream in the place of latents join it, and return it.

    Args:
        x: ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them until the first branch.
    """

    def __init__(self, x: Tensor):
        self._x = x
        self._branch: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def learned(self) -> Tensor | None:
        """In inference the parameter that the stream shows, until a branch joins: the same at every call."""
        if self._branch is not None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        base = self._x._base if self._x._is_view() else self._x
        if type(base) is not nn.Parameter or self._x.shape != (1, *base.shape):
            return None
        return base if base.is_contiguous() and self._x.is_contiguous() else None  # transposed it shows something else

    @property
    def shape(self):
        """That of the latents."""
        return self._x.shape

    def add(self, branch: Tensor, bias: Tensor | None = None) -> None:
        """Let ``branch + bias`` join; branch ``[B, N, D]``, bias ``[D]``."""
        self._x = self.value().expand_as(branch)
        self._branch, self._bias = branch, bias

    def normalized(self, norm: nn.Module) -> Tensor:
        """``norm`` of the stream so far, in the dtype that products are computed in."""
        if self._branch is None or not _fits(norm, self._x):
            return normalize(norm, self.value())
        dtype = product_dtype(self._x)
        self._x, z = run_layer_norm(
            self._x, self._branch.to(dtype), self._bias, norm.weight, norm.bias, norm.eps, dtype
        )
        self._branch = self._bias = None
        return z

    def value(self) -> Tensor:
        """The latents, with all branches in."""
        if self._branch is not None:
            branch = self._branch if self._bias is None else self._branch + self._bias
            self._x = (self._x + branch).to(self._x.dtype)
            self._branch = self._bias = None
        return self._x


class Branch(Cached):
    """A layer that ends in a linear one, whose bias it can leave to the stream: ``forward(x, bias_apart=True)`` then
    returns its output before the bias, and the bias or None."""


class PreNorm(nn.Module):
    """``fn(LayerNorm(x), ..)``; called with a :class:`ResidualStream`, lets that join it."""

    def __init__(self, dim: int, fn: nn.Module):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor | ResidualStream, **keywords) -> Tensor | ResidualStream:
        if not isinstance(x, ResidualStream):
            return self.fn(normalize(self.norm, x), **keywords)
        z = x.normalized(self.norm)
        if isinstance(self.fn, Branch):
            x.add(*self.fn(z, bias_apart=True, **keywords))
        else:
            x.add(self.fn(z, **keywords))
        return x


class Residual(nn.Module):
    """``x + fn(x)``, of a :class:`PreNorm`."""

    def __init__(self, fn: PreNorm):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(ResidualStream(x)).value()
