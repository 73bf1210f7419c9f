"""What the ways of a cross-attention compute from its parameters: tables of keys and values, and queries for them.

LayerNorm's affine part moves into the projection after it, ``W = to_kv gamma`` and ``b = to_kv beta``. All is computed
anew at every call: parameters may change between calls by any route.
"""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.narrow_products import NarrowProduct
from perceiver_fast.ops.library import dropout_seed, seed_from, unless_autocast
from perceiver_fast.tokens import GridTokens

Layer = TypeVar("Layer", bound="CrossAttentionParameters")


def times_tables(x: Tensor, table: Tensor, narrow: bool = False) -> Tensor:
    """``x [B, H, N, K]`` times every head's table ``[H, K, L]``: ``[B, H, N, L]``, one product a head for the whole batch.

    ``narrow``: both are rounded to bfloat16, as autocast would; the result is float32.
    """
    batch, heads, rows, _ = x.shape
    product = NarrowProduct.apply if narrow else torch.bmm
    if batch == 1:
        return product(x.squeeze(0), table).unsqueeze(0)
    return product(x.transpose(0, 1).flatten(1, 2), table).unflatten(1, (batch, rows)).transpose(0, 1)


class _Frozen:
    """An attention whose probability of dropout stays what it was."""

    def __init__(self, fn: Attention):
        self._fn, self.active_dropout = fn, fn.active_dropout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fn, name)


class CrossAttentionParameters:
    """The parameters of a PreNorm with a context, and products of them, for one call of the layer.

    Args:
        layer: the PreNorm; ``layer.fn`` is the attention.
    """

    def __init__(self, layer: nn.Module):
        modules: dict[str, Any] = layer._modules
        self.layer = layer
        self.fn: Attention = modules["fn"]
        self.norm: nn.Module = modules["norm"]
        self.norm_context: nn.LayerNorm = modules["norm_context"]
        self.to_kv: nn.Linear = self.fn._modules["to_kv"]
        self._q: Tensor | None = None
        self._seed: Tensor | None = None

    def tensors(self, z: Tensor) -> tuple[Tensor, ...]:
        """What attention to tokens depends on, beside these: projected latents, and the parameters that meet tokens."""
        return self.to_q(z), self.to_kv.weight, self.norm_context.weight, self.norm_context.bias

    def of_tensors(self: Layer, q: Tensor, weight: Tensor, gain: Tensor, shift: Tensor) -> Layer:
        """The same layer, computed from other tensors in the places of :meth:`tensors`."""
        other, to_kv, norm = copy(self), SimpleNamespace(weight=weight), self.norm_context
        other._q = q
        other.to_kv = cast(nn.Linear, to_kv)
        other.norm_context = cast(nn.LayerNorm, SimpleNamespace(weight=gain, bias=shift, eps=norm.eps))
        return other

    def freeze(self) -> None:
        """Let this call keep its probability of dropout: its backward runs it again, when the model's mode may be another."""
        self.fn = cast(Attention, _Frozen(self.fn))

    def seed(self, first: int, device: torch.device) -> Tensor | None:
        """Dropout's seed for tokens from index ``first`` on, None without dropout: one draw a call, then indices decide."""
        if self._seed is None:
            self._seed = dropout_seed(self.fn.active_dropout, device)
        return seed_from(self._seed, first)

    @property
    def dim_head(self) -> int:
        """Channels of a head, d."""
        to_kv: Any = self.fn._modules["to_kv"]
        return to_kv._parameters["weight"].shape[0] // (2 * self.fn.heads)

    def to_q(self, z: Tensor) -> Tensor:
        """``to_q(z)``, ``[B, N, H d]``: computed once a call, for all groups of tokens."""
        if self._q is None:
            self._q = self.fn.project("to_q", z)
        return self._q

    def queries(
        self, z: Tensor, keys: Tensor, key_bias: Tensor | None, narrow: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries moved to the columns of a table of keys, so that they attend to the columns themselves.

        Args:
            z: normalised latents ``[B, N, D]``.
            keys: ``[H, d, L]``, times the scale of the logits.
            key_bias: ``[H, d]``, times the same scale; None where it does not matter.
            narrow: queries and keys are rounded to bfloat16. Default: False.

        Returns:
            ``to_q(z)`` times the keys ``[B, H, N, L]``, and times their bias ``[B, H, N]``: what it adds to the logits.
        """
        q = self.to_q(z)
        with unless_autocast(z.device):
            q = q.unflatten(-1, (self.fn.heads, -1)).transpose(1, 2)
            moved = times_tables(q, keys, True) if narrow else times_tables(q.to(keys.dtype), keys)
            if key_bias is None:
                return moved, None
            return moved, times_tables(q.to(keys.dtype), key_bias.unsqueeze(-1)).squeeze(-1)

    def by_head(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A projection of tokens to keys and values, taken apart.

        Args:
            weight: ``[2 H d, L]``.
            bias: ``[2 H d]``.

        Returns:
            Keys ``[H, d, L]`` and their bias ``[H, d]``, both times the scale of the logits; values ``[H, d, L]`` and
            their bias ``[H, d]``.
        """
        fn, heads = self.fn, (2, self.fn.heads, -1)
        (keys, values), (key_bias, value_bias) = weight.unflatten(0, heads), bias.unflatten(0, heads)
        return keys * fn.scale, key_bias * fn.scale, values, value_bias

    def grid_tables(
        self, z: Tensor, tokens: GridTokens, biased: bool = True, narrow: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What grid attention needs of normalised latents ``z [B, N, D]``, in the dtype that it computes in.

        Args:
            z: normalised latents.
            tokens: what is attended to.
            biased: whether it matters what the keys' bias adds to the logits. Default: True.
            narrow: the product that gives the queries rounds both factors to bfloat16. Default: False.

        Returns:
            Queries ``[B, H, N, L]``, L = elements + sum(sizes); what the keys' bias adds to the logits ``[B, H, N]``, or None; values
            ``[H, L, d]`` and their bias ``[H, d]``. B is 1 where the whole batch shares the latents.
        """
        with unless_autocast(z.device):
            table = self.by_head(*tokens.project(self.to_kv, self.norm_context))
        keys, key_bias, values, value_bias = table
        q, logit_bias = self.queries(z, keys, key_bias if biased else None, narrow)
        return q, logit_bias, values.transpose(1, 2), value_bias

    def weighted_bias(self, value_bias: Tensor, weight_sums: Tensor | None) -> Tensor:
        """What the values' bias adds to the result: it counts as often as a query's attention weights sum to.

        Args:
            value_bias: ``[H, d]``.
            weight_sums: every query's sum of weights ``[B, H N]``; None where they are all one.

        Returns:
            ``[B, N, H, d]``, or ``[H, d]`` where all sums are one.
        """
        if weight_sums is None:
            return value_bias
        return torch.einsum("bhn,hd->bnhd", weight_sums.unflatten(1, (self.fn.heads, -1)), value_bias)
