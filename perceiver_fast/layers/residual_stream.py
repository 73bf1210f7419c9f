"""The residual stream: latents on their way through a block, and the branches that are added to them.

A branch is what a layer computes from the normalised stream, before it is added. A stream lives inside one function,
such as a block's forward, and is never passed to a module.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.layer_norm import add_layer_norm_unchecked
from perceiver_fast.ops.linear import product_dtype


def fits(norm: nn.Module, x: Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether an op may stand in for a call ``norm(x)``.

    Not if dtypes differ, as under autocast, where tokens in half precision meet parameters in float32.
    """
    if not is_plain(norm, nn.LayerNorm):
        return False
    # Read directly: nn.Module's attribute access would take as long as all of this.
    parameters: dict[str, Any] = norm._parameters
    weight = parameters["weight"]
    return parameters["bias"] is not None and weight.dtype == x.dtype and weight.shape == x.shape[-1:]


def normalize(norm: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``norm(x)``, ``[.., D]``; by an op if it may stand in for the norm.

    Args:
        norm: of any kind.
        x: ``[.., D]``.
        dtype: of the op's result. Default: that of the product that follows.
    """
    if not fits(norm, x):
        return norm(x)
    parameters: dict[str, Any] = norm._parameters
    dtype = product_dtype(x) if dtype is None else dtype
    return add_layer_norm_unchecked(x, None, None, parameters["weight"], parameters["bias"], norm.eps, dtype)[1]


def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """A projection ``[.., D]`` and the bias ``[D]``, if any, that was left out of it.

    Raises:
        RuntimeError: the memory of the bias was freed, where torch's addition would crash.
    """
    if bias is None:
        return out
    check_memory("bias", bias)
    return out + bias.to(out.dtype)


def shared_rows(x: Tensor) -> Tensor:
    """One row ``[1, N, D]`` of ``x [B, N, D]``, if all rows are the same memory, as expanded latents are; else ``x``.

    Where gradients are recorded it is ``x``: somebody may ask for those of every row.
    """
    if x.dim() != 3 or x.stride(0) != 0 or (torch.is_grad_enabled() and x.requires_grad):
        return x
    if not torch.compiler.is_compiling() and (transformed() or torch._C._get_tracing_state() is not None):
        return x
    return x[:1]


class ResidualStream:
    """Latents ``[B, N, D]`` on their way through layers that each begin with a LayerNorm.

    A branch is not added at once: it waits until the next layer asks for the normalised stream. Adding the branch and
    its bias, and LayerNorm of the sum, are then one op.

    Args:
        x: ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them. Shared latents stay one row, and are
            computed with once, until a branch with a row for every batch element is added.
        batch: number of batch elements. Default: that of x.
    """

    def __init__(self, x: Tensor, batch: int | None = None):
        self._batch = x.shape[0] if batch is None or x.dim() != 3 or x.shape[0] != 1 else batch
        # The value of the stream, as long as that is known without an addition.
        self._whole: Tensor | None = x if batch is None else x.expand(self._batch, *x.shape[1:])
        self._x = shared_rows(x)
        # The branch that waits to be added, and its bias.
        self._branch: Tensor | None = None
        self._bias: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the latents, ``[1, N, D]`` as long as the whole batch shares them."""
        return self._x.shape if self._branch is None else self._branch.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents."""
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        """Where the latents are."""
        return self._x.device

    def rows(self) -> Tensor:
        """The latents ``[B, N, D]`` or one shared row ``[1, N, D]``, all branches added."""
        return self._added()

    def become(self, x: Tensor) -> None:
        """Go on with other latents ``[B, N, D]``, which all branches and more have been added to."""
        self._x = self._whole = x
        self._branch = self._bias = None

    def add(self, branch: Tensor, bias: Tensor | None = None) -> None:
        """Add ``branch [B, N, D]`` and ``bias [D]``, as late as possible."""
        x = self._added()
        self._x = x if x.shape == branch.shape else x.expand_as(branch)
        bias = bias if bias is None or bias.dtype == self._x.dtype else bias.to(self._x.dtype)
        self._whole, self._branch, self._bias = None, branch, bias

    def add_output(self, out: Tensor) -> None:
        """Add what a module returned, at once and by torch's addition: its result may be a subclass of Tensor."""
        self._x, self._whole = out + self.value(), None

    def normalized(self, norm: nn.Module) -> Tensor:
        """``norm`` of the stream, ``[B, N, D]`` or one shared row, in the dtype of the product that follows.

        A norm that is not plain is called on the whole batch.
        """
        if not fits(norm, self._x):
            return norm(self.value())
        dtype = product_dtype(self._x)
        branch = None if self._branch is None else self._branch.to(dtype)
        parameters: dict[str, Any] = norm._parameters
        x, z = add_layer_norm_unchecked(
            self._x, branch, self._bias, parameters["weight"], parameters["bias"], norm.eps, dtype
        )
        if branch is not None:
            self._x, self._branch, self._bias = x, None, None
        return z

    def value(self) -> Tensor:
        """The latents ``[B, N, D]``, all branches added."""
        if self._whole is not None:
            return self._whole
        x = self._added()
        return x if x.shape[0] == self._batch or x.dim() != 3 else x.expand(self._batch, -1, -1)

    def _added(self) -> Tensor:
        """The latents, one row where they are shared, after the branch that waits was added."""
        if self._branch is not None:
            check_memory("residual", self._bias)
            branch = self._branch if self._bias is None else self._branch + self._bias
            self._x = (self._x + branch).to(self._x.dtype)
            self._branch = self._bias = None
        return self._x
