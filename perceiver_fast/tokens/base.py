"""What every description of tokens offers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.ops.projected_attention import Projection
from perceiver_fast.tracing import known

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard


class Basis(NamedTuple):
    """A projection of described tokens: ``projection(norm(token_m)) = scale_m (weight basis_m) + bias``.

    The basis is ``[feat_m, onehot(i_1), .., onehot(i_A)]`` on a grid, and else feat_m.

    Attributes:
        weight: ``[D, L]``, L = E + sum(sizes) on a grid, and else E.
        bias: ``[D]``.
        feat: ``[B, *sizes, E]``, E may be zero; or ``[B, M, E]``. B is 1 where the whole batch shares the tokens.
        scale: of every token, ``[B, *sizes]`` or ``[B, M]``; None where it is one.
        grid: whether the tokens stand on a grid.
    """

    weight: Tensor
    bias: Tensor
    feat: Tensor
    scale: Tensor | None
    grid: bool


class Tokens:
    """A description of M tokens of C channels for every batch element, in the place of the tensor ``[B, M, C]``.

    Made once a forward, and shared by all cross-attention layers.

    Attributes:
        kind: what the tokens are, for people: "grid tokens".
        feat: the channels of the tokens that exist in memory, ``[B, M, F]``, on a grid ``[B, n_1, .., n_A, F]``.
        dtype: of the input.
    """

    kind: str
    feat: Tensor
    dtype: torch.dtype
    # Where each channel, in the order that a norm and a projection expect, stands in the description's own order: int64
    # [C]. None: they are the same.
    order: Tensor | None = None
    first = 0  # index of the first token among all tokens, of which these may be a part: dropout depends on it
    shard: Shard | None = None  # of the input that these are this process' part of, perceiver_fast/distributed
    total = 0  # tokens of all processes, where they have parts
    _tensor: Tensor | None = None  # what tensor() returned
    _version = 0  # the version of that tensor when it was first returned

    @property
    def channels(self) -> int:
        """Channels of a token as perceiver-pytorch would build it, C."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Number of batch elements, B."""
        return self.feat.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens of a batch element, M."""
        return math.prod(self.feat.shape[1:-1])

    @property
    def stored_channels(self) -> int:
        """Channels of a token that exist in memory, F."""
        return self.feat.shape[-1]

    @property
    def half_product(self) -> bool:
        """Whether keys and values are a product that autocast rounds; else they are computed in float32 whatever it asks for."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.feat.device

    @property
    def compute(self) -> torch.dtype:
        """The dtype that attention to the tokens is computed in: float32, or float64 for float64."""
        return compute_dtype(self.feat.dtype)

    def materialize(self) -> Tensor:
        """The tensor ``[B, M, C]`` that this object describes, newly built."""
        raise NotImplementedError

    def tensor(self) -> Tensor:
        """:meth:`materialize`, built once and returned to all who ask: for modules that have to be called on tensors."""
        tensor = self._tensor
        if torch.compiler.is_compiling():
            return self.materialize()
        if tensor is not None and self.was_changed():
            return tensor
        # A tensor that carries a gradient is built anew for every layer, since a checkpointed layer builds its own again.
        if tensor is None or (torch.is_grad_enabled() and self.learns()):
            recorded = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(recorded):  # so that torch counts its changes
                tensor = self._tensor = self.materialize()
            self._version = 0 if tensor.is_inference() else tensor._version
        return tensor

    def was_changed(self) -> bool:
        """Whether somebody wrote in place to what :meth:`tensor` returned, which then is what the tokens are."""
        tensor = self._tensor
        return tensor is not None and not tensor.is_inference() and tensor._version != self._version

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that the tokens are made of."""
        raise NotImplementedError

    def learns(self) -> bool:
        """Whether a gradient flows to any of :meth:`sources`."""
        return any(source.requires_grad for source in self.sources())

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        """Keys and values ``to_kv(norm(tokens))``, ``[B, M, 2 H d]``, as a tensor.

        Args:
            to_kv: the linear layer whose weight ``[2 H d, C]`` is used; it has no bias.
            norm: the LayerNorm of the tokens; its weight, bias and eps are used.
        """
        raise NotImplementedError

    def projection(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Projection | None:
        """:meth:`keys_values` as what they are made of, from which they may be built in pieces; None if there is no such."""
        return None

    def basis(self, projection: nn.Linear, norm: nn.LayerNorm) -> Basis:
        """``projection(norm(tokens))``, as a table of what tokens are made of. The projection's bias is left out.

        Args:
            projection: the linear layer whose weight ``[D, C]`` is used.
            norm: the LayerNorm of the tokens; its weight, bias and eps are used.
        """
        raise NotImplementedError

    @property
    def absorbed_channels(self) -> int | None:
        """Channels of :meth:`basis`, where attention may run over them in the place of keys and values; else None."""
        return None

    def absorbed_operations(self) -> float:
        """Multiply-adds of building :meth:`basis` for one batch element, where attention runs over its channels."""
        return 0.0

    def part(self, piece: slice) -> Tokens:
        """Some of the tokens; a grid's are not apart."""
        raise NotImplementedError

    def in_order(self, built: Tensor) -> Tensor:
        """``[.., C]`` in the description's own order, brought into the one that is expected."""
        return built if self.order is None else built[..., self.order]

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        """The ops beside attention that ``path`` (see layers/plan.py) runs on these tokens, with their backends.

        Args:
            path: the way.
            width: channels of keys and values of all heads together.
        """
        return ()

    def projection_operations(self, width: int) -> float:
        """Multiply-adds of :meth:`keys_values` for one batch element and ``width`` output channels."""
        return known(self.count) * self.channels * width


def absorb_norm(
    to_kv: nn.Linear, norm: nn.LayerNorm, dtype: torch.dtype, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A projection that includes the affine part of the LayerNorm before it.

    Args:
        to_kv: the linear layer of weight ``[D, C]``, without bias.
        norm: the LayerNorm of weight and bias ``[C]``.
        dtype: of the result.
        order: of the tokens' channels, see :attr:`Tokens.order`; the columns of the result are in their own.

    Returns:
        Weight ``[D, C]`` and bias ``[D]``, with which ``to_kv(norm(x)) = weight z + bias`` for x normalised to z.
    """
    check_memory("to_kv(norm(tokens))", to_kv.weight, norm.weight, norm.bias)
    weight = to_kv.weight.to(dtype)
    scaled, bias = weight * norm.weight.to(dtype), weight @ norm.bias.to(dtype)
    return scaled if order is None else torch.zeros_like(scaled).index_copy(1, order, scaled), bias
