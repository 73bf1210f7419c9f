"""What the ways of a cross-attention compute from its parameters: tables of keys and values, and queries for them.

LayerNorm's affine part moves into the projection after it, ``W = to_kv gamma`` and ``b = to_kv beta``. The products of
the tokens' parameters alone are cached in inference; so are the queries of learned latents, in a model's first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.ops.library import unless_autocast
from perceiver_fast.tokens import GridTokens

T = TypeVar("T")


class CrossAttentionParameters:
    """The parameters of a PreNorm with a context, and products of them, for one call of the layer.

    Args:
        layer: the PreNorm; ``layer.fn`` is the attention.
    """

    def __init__(self, layer: nn.Module):
        modules = layer._modules
        self.layer, self.fn = layer, modules["fn"]
        self.norm, self.norm_context = modules["norm"], modules.get("norm_context")
        self._q: Tensor | None = None

    @property
    def dim_head(self) -> int:
        """Channels of a head, d."""
        return self.fn._modules["to_kv"]._parameters["weight"].shape[0] // (2 * self.fn.heads)

    def to_q(self, z: Tensor) -> Tensor:
        """``to_q(z)``, ``[B, N, H d]``: computed once a call, for all groups of tokens."""
        if self._q is None:
            self._q = self.fn.project("to_q", z)
        return self._q

    def queries(self, z: Tensor, keys: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        """Queries moved to the columns of a table of keys, so that they attend to the columns themselves.

        Args:
            z: normalised latents ``[B, N, D]``.
            keys: ``[H, d, L]``, times the scale of the logits.
            key_bias: ``[H, d]``, times the same scale.

        Returns:
            ``to_q(z)`` times the keys ``[B, H, N, L]``, and times their bias ``[B, H, N]``: what it adds to the logits.
        """
        to_q, cache = self.fn._modules["to_q"], self.fn.cache

        def queries():
            q = self.to_q(z)
            with unless_autocast(z.device):
                q = q.to(keys.dtype).unflatten(-1, (self.fn.heads, -1))
                return torch.einsum("bnhd,hdl->bhnl", q, keys), torch.einsum("bnhd,hd->bhn", q, key_bias)

        if cache.holds("latents", z) and is_plain(to_q, nn.Linear) and to_q.bias is None:
            return cache.get("queries", (z, to_q.weight, keys, key_bias), queries)
        return queries()

    def keys_values(
        self, name: str, project: Callable[[], tuple[Tensor, Tensor]], sources: Sequence[Tensor], cache_key: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A table of keys and values, by head; cached in inference.

        Args:
            name: of the table in the cache.
            project: computes weight ``[2 H d, L]`` and bias ``[2 H d]`` from ``to_kv`` and ``norm_context``.
            sources: the tensors that ``project`` uses beside their parameters.
            cache_key: all else that it uses.

        Returns:
            Keys ``[H, d, L]`` and their bias ``[H, d]``, both times the scale of the logits; values ``[H, d, L]`` and
            their bias ``[H, d]``.
        """
        fn, norm = self.fn, self.norm_context._parameters
        parameters = fn._modules["to_kv"]._parameters["weight"], norm["weight"], norm["bias"]

        def build():
            weight, bias = project()
            heads = (2, fn.heads, -1)
            (keys, values), (key_bias, value_bias) = weight.unflatten(0, heads), bias.unflatten(0, heads)
            return keys * fn.scale, key_bias * fn.scale, values, value_bias

        with unless_autocast(parameters[0].device):
            return fn.cache.get(name, (*parameters, *sources), build, (cache_key, fn.heads, fn.scale))

    def grid_tables(self, z: Tensor, tokens: GridTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What grid attention needs of normalised latents ``z [B, N, D]``, in the dtype that it computes in.

        Returns:
            Queries ``[B, H, N, L]``, L = F + sum(sizes); what the keys' bias adds to the logits ``[B, H, N]``; values
            ``[H, L, d]`` and their bias ``[H, d]``. B is 1 where the whole batch shares the latents.
        """
        codes = [axis.code for axis in tokens.codes]

        def project():
            return tokens.project(self.fn.to_kv, self.norm_context)

        table = self.keys_values("basis", project, codes, (tokens.features, tokens.compute))
        keys, key_bias, values, value_bias = table
        q, logit_bias = self.queries(z, keys, key_bias)
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
