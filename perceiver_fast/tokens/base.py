"""What every description of tokens offers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice


class Tokens:
    """What every description of tokens offers.

    Attributes:
        kind: what the tokens are, for people: "grid tokens".
        batch: number of batch elements, B.
        count: number of tokens of a batch element, M.
        channels: channels of a token as perceiver-pytorch would build it, C.
        stored_channels: channels of a token that exist in memory.
        device: where they are.
        compute: the dtype that attention on them is computed in.
    """

    kind: str
    batch: int
    count: int
    channels: int
    stored_channels: int
    device: torch.device
    compute: torch.dtype
    _tensor: Tensor | None = None

    def materialize(self) -> Tensor:
        """The ``[B, M, C]`` tensor this object stands for."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """:meth:`materialize`, once for all who ask: for modules that have to be called, on what perceiver-pytorch builds."""
        tensor = self._tensor
        if tensor is None or (torch.is_grad_enabled() and self.learns()):
            tensor = self.materialize()
            if not tensor.requires_grad:  # what carries a gradient belongs to the layer that asked (checkpointing)
                self._tensor = tensor
        return tensor

    def learns(self) -> bool:
        """Whether a gradient flows to what the tokens are made of."""
        raise NotImplementedError

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        """``to_kv(norm(tokens))``, ``[B, M, 2 H d]``, for paths that need keys and values as tensors."""
        raise NotImplementedError

    def uses(self, path: str) -> tuple[Choice, ...]:
        """Ops beside attention that a layer needs of these tokens on its way, with the backends that run them."""
        return ()

    def projection_operations(self, width: int, known: Callable[[int], int] = int) -> float:
        """Multiply-adds of :meth:`keys_values` for one batch element and ``width`` output channels.

        ``known`` gives a number for a size that is none yet, where a graph for any size is traced.
        """
        return known(self.count) * self.channels * width


def absorb_norm(to_kv: nn.Linear, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine part moved into the projection after it: weight ``[D, C]`` and bias ``[D]``."""
    weight = to_kv.weight.to(dtype)
    return weight * norm.weight.to(dtype), weight @ norm.bias.to(dtype)
