"""The residual stream: latents that branches join, each after a LayerNorm of what the ones before it made.

A stream lives inside one function, that of a block for example, and is never handed to a module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.layer_norm import add_layer_norm_unchecked
from perceiver_fast.ops.linear import product_dtype


def fits(norm: nn.Module, x: Tensor) -> bool:
    """Whether the op can stand in for ``norm``; tokens that autocast made half precision meet float32 parameters."""
    if not is_plain(norm, nn.LayerNorm):
        return False
    parameters = norm._parameters  # nn.Module's own look-ups take as long as the whole question
    weight = parameters["weight"]
    return parameters["bias"] is not None and weight.dtype == x.dtype and weight.shape == x.shape[-1:]


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the dtype that products of it are computed in, by the op where it can stand in for ``norm``."""
    if not fits(norm, x):
        return norm(x)
    parameters = norm._parameters
    return add_layer_norm_unchecked(
        x, None, None, parameters["weight"], parameters["bias"], norm.eps, product_dtype(x)
    )[1]


def shared_rows(x: Tensor) -> Tensor:
    """``[1, N, D]`` where the whole batch of ``x [B, N, D]`` shows the same memory, as learned latents do; else x.

    Not where gradients are recorded: somebody may ask for those of every row.
    """
    if x.dim() != 3 or x.stride(0) != 0 or (torch.is_grad_enabled() and x.requires_grad):
        return x
    if not torch.compiler.is_compiling() and (transformed() or torch._C._get_tracing_state() is not None):
        return x
    return x[:1]


class ResidualStream:
    """Latents ``[B, N, D]`` on their way through pre-normalised layers.

    A branch waits until the next layer asks for the normalised stream: adding it, its bias and normalising are then one
    op.

    Args:
        x: ``[B, N, D]``, or ``[1, N, D]`` that the whole batch shares. Latents that exist once are computed with once,
            until the first branch joins that does not.
        batch: number of batch elements. Default: that of x.
    """

    def __init__(self, x: Tensor, batch: int | None = None):
        self._batch = x.shape[0] if batch is None or x.dim() != 3 or x.shape[0] != 1 else batch
        self._whole: Tensor | None = x if batch is None else x.expand(self._batch, *x.shape[1:])  # until a branch joins
        self._x = shared_rows(x)
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
    def shape(self) -> torch.Size:
        """That of the latents, ``[1, N, D]`` as long as the whole batch shares them."""
        return self._x.shape if self._branch is None else self._branch.shape

    def add(self, branch: Tensor, bias: Tensor | None = None) -> None:
        """Let ``branch + bias`` join; branch ``[B, N, D]``, bias ``[D]``."""
        self._x = self._joined().expand_as(branch)
        bias = bias if bias is None or bias.dtype == self._x.dtype else bias.to(self._x.dtype)
        self._whole, self._branch, self._bias = None, branch, bias

    def add_output(self, out: Tensor) -> None:
        """Let what a module returned join, by torch's own addition: it may be anything that can be added."""
        self._x, self._whole = out + self.value(), None

    def normalized(self, norm: nn.Module) -> Tensor:
        """``norm`` of the stream so far, in the dtype that products are computed in; a norm that is more is called."""
        if not fits(norm, self._x):
            return norm(self.value())
        dtype = product_dtype(self._x)
        branch = None if self._branch is None else self._branch.to(dtype)
        weight, bias = norm._parameters["weight"], norm._parameters["bias"]
        x, z = add_layer_norm_unchecked(self._x, branch, self._bias, weight, bias, norm.eps, dtype)
        if branch is not None:
            self._x, self._branch, self._bias = x, None, None
        return z

    def value(self) -> Tensor:
        """The latents ``[B, N, D]``, with all branches in."""
        if self._whole is not None:
            return self._whole
        x = self._joined()
        return x if x.shape[0] == self._batch or x.dim() != 3 else x.expand(self._batch, -1, -1)

    def _joined(self) -> Tensor:
        if self._branch is not None:
            branch = self._branch if self._bias is None else self._branch + self._bias
            self._x = (self._x + branch).to(self._x.dtype)
            self._branch = self._bias = None
        return self._x
