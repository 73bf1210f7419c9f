"""What every description of tokens offers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.tracing import known


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
    _version = 0  # of the tensor when it was handed out

    def materialize(self) -> Tensor:
        """The ``[B, M, C]`` tensor this object stands for."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """:meth:`materialize`, once for all who ask: for modules that have to be called, on what perceiver-pytorch builds."""
        tensor = self._tensor
        if torch.compiler.is_compiling():
            return self.materialize()
        if tensor is not None and self.was_changed():
            return tensor
        # What carries a gradient belongs to the layer that asked (checkpointing).
        if tensor is None or (torch.is_grad_enabled() and self.learns()):
            recorded = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(recorded):  # so that its changes are counted
                tensor = self._tensor = self.materialize()
            self._version = 0 if tensor.is_inference() else tensor._version
        return tensor

    def was_changed(self) -> bool:
        """Whether somebody who was handed the tensor has changed it in place: all others then see that, too."""
        tensor = self._tensor
        return tensor is not None and not tensor.is_inference() and tensor._version != self._version

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that the tokens are made of."""
        raise NotImplementedError

    def learns(self) -> bool:
        """Whether a gradient flows to what the tokens are made of."""
        return any(source.requires_grad for source in self.sources())

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        """``to_kv(norm(tokens))``, ``[B, M, 2 H d]``, for paths that need keys and values as tensors."""
        raise NotImplementedError

    def uses(self, path: str) -> tuple[Choice, ...]:
        """Ops beside attention that a layer needs of these tokens on its way, with the backends that run them."""
        return ()

    def projection_operations(self, width: int) -> float:
        """Multiply-adds of :meth:`keys_values` for one batch element and ``width`` output channels."""
        return known(self.count) * self.channels * width


def absorb_norm(to_kv: nn.Linear, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine part moved into the projection after it: weight ``[D, C]`` and bias ``[D]``."""
    weight = to_kv.weight.to(dtype)
    return weight * norm.weight.to(dtype), weight @ norm.bias.to(dtype)
