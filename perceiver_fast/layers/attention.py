"""Multi-head attention of perceiver-pytorch: projections to queries, keys and values, attention, and one projection out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.float64 import lse_of
from perceiver_fast.layers.fusing import are_plain, fusable, is_plain, is_watched, why_not
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.residual_stream import with_bias
from perceiver_fast.ops.cross_attention import cross_attention, cross_attention_unchecked
from perceiver_fast.ops.library import compute_dtype, dropout_seed, seed_from
from perceiver_fast.ops.linear import linear, product_dtype
from perceiver_fast.ops.self_attention import self_attention
from perceiver_fast.ranges import layer_range
from perceiver_fast.reference.softmax import EMPTY_LSE
from perceiver_fast.shards.shard import CalledAttention, ShardedAttention


@fusable
class Attention(ShardedAttention):
    """Attention of ``x [B, N, D]`` to a context ``[B, M, C]``, or to ``x`` itself where there is none.

    Args:
        query_dim: channels of queries and of the output, D.
        context_dim: channels of what is attended to, C. Default: query_dim.
        heads: number of heads. Default: 8.
        dim_head: channels of a head. Default: 64.
        dropout: dropout of attention weights in training. Default: 0.
        queries_contribute_kv: attend to the queries, too, before the context; needs context_dim == query_dim.
            Default: False.

    Raises:
        ValueError: queries_contribute_kv with another context_dim.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.layers import Attention
        >>> Attention(8, 12, heads=2, dim_head=4)(torch.randn(2, 5, 8), context=torch.randn(2, 30, 12)).shape
        torch.Size([2, 5, 8])
    """

    queries_contribute_kv = False
    drops = True  # False in subclasses whose weights never pass through a dropout layer

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        queries_contribute_kv: bool = False,
    ):
        super().__init__()
        inner_dim = dim_head * heads
        context_dim = query_dim if context_dim is None else context_dim
        if queries_contribute_kv and context_dim != query_dim:
            raise ValueError(
                f"queries_contribute_kv: expected context_dim == dim, got {context_dim} and {query_dim}; the queries are "
                "projected to keys and values by the weights of the tokens"
            )
        self.scale = dim_head**-0.5
        self.heads = heads
        self.dim_head = dim_head
        self.queries_contribute_kv = queries_contribute_kv
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(context_dim, inner_dim * 2, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.to_out = nn.Linear(inner_dim, query_dim)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("dim_head", round(self.scale**-2))  # perceiver-pytorch's pickles have none

    @property
    def active_dropout(self) -> float:
        """Probability of dropping an attention weight in the current mode; only for a dropout layer that is plain."""
        dropout: Any = self._modules.get("dropout") if self.drops else None
        return dropout.p if dropout is not None and dropout.training else 0.0

    def split_heads(self, x: Tensor) -> Tensor:
        """``[B, N, H d]`` to ``[B, H, N, d]``."""
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)

    def project(self, name: str, x: Tensor) -> Tensor:
        """``to_q(x)`` or ``to_kv(x)``, ``[.., D]`` to ``[.., D']``: by an op if the layer is plain, else by calling it.

        Args:
            name: ``"to_q"`` or ``"to_kv"``.
            x: ``[.., D]``.
        """
        layer: Any = self._modules[name]
        if not is_plain(layer, nn.Linear):
            return layer(x)
        parameters: dict[str, Any] = layer._parameters
        return linear(x.to(product_dtype(x)), parameters["weight"], parameters["bias"])

    def project_out(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``to_out`` of ``x [.., H d]`` without its bias, and the bias; if it is not plain, its result and None."""
        layer: Any = self._modules["to_out"]
        if not is_plain(layer, nn.Linear):
            return layer(x), None
        parameters: dict[str, Any] = layer._parameters
        return linear(x, parameters["weight"]), parameters["bias"]

    def why_modules(self) -> str | None:
        """Why the layers inside have to be called, in words; None if :meth:`branch` may stand in for a call of this one."""
        layers = self._modules
        return (
            self.why_weights()
            or why_not("to_q", layers["to_q"], nn.Linear)
            or why_not("to_kv", layers["to_kv"], nn.Linear)
            or why_not("to_out", layers["to_out"], nn.Linear)
        )

    def why_weights(self) -> str | None:
        """Why attention weights have to be computed by torch's operators and given to ``dropout``; None if they need not."""
        if type(self.scale) not in (float, int):
            return "its scale is no plain number"
        dropout: Any = self._modules.get("dropout") if self.drops else None
        if dropout is None:
            return None
        found = why_not("dropout", dropout, nn.Dropout)
        return "dropout drops all weights" if found is None and dropout.p >= 1 and dropout.training else found

    def projections(self) -> tuple[Any, ...] | None:
        """Weights of ``to_q``, ``to_kv`` and ``to_out``, and the bias of the last, if attention depends on no more than
        them, heads, scale and dropout; else None. Only where :meth:`why_modules` is None."""
        layers: dict[str, Any] = self._modules
        to_q, to_kv, to_out = (layers[name]._parameters for name in ("to_q", "to_kv", "to_out"))
        if to_q["bias"] is not None or to_kv["bias"] is not None:
            return None
        q, kv = to_q["weight"], to_kv["weight"]
        if kv.shape[0] != 2 * q.shape[0] or q.shape[0] % self.heads:  # pruned
            return None
        return q, kv, to_out["weight"], to_out["bias"]

    @layer_range
    def branch(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Self-attention, in the place of a call; only where :meth:`why_modules` is None.

        Args:
            z: normalised latents ``[B, N, D]``.

        Returns:
            ``[B, N, D]`` without the bias of ``to_out``, and the bias ``[D]``.
        """
        if (looks := observer()) is not None:
            looks.attends(self, z)
        q = self.project("to_q", z)
        k, v = self.project("to_kv", z).chunk(2, dim=-1)
        return self.project_out(self._fused(q, k, v))

    @layer_range
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        inverted_attention: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: ``[B, N, query_dim]``.
            context: ``[B, M, context_dim]``. Default: x.
            mask: bool ``[B, M]`` or ``[B, ..]`` of M elements, True where a token may be attended to. Default: all.
            inverted_attention: softmax over ``x``, then normalised over the context. Default: False.

        Returns:
            ``[B, N, query_dim]``.
        """
        fused = not is_watched(x, context, mask)
        if context is None and mask is None and (looks := observer()) is not None:
            looks.attends(self, x, inverted=inverted_attention)
        modules: dict[str, Any] = self._modules
        project = self.project if fused else (lambda name, x: modules[name](x))
        q = project("to_q", x)
        tokens = x if context is None else context
        if self.queries_contribute_kv and context is not None:
            tokens = torch.cat([x, context], dim=1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(mask.shape[0], x.shape[1]), mask.flatten(1)], dim=-1)
        k, v = project("to_kv", tokens).chunk(2, dim=-1)
        mask = None if mask is None else mask.flatten(1)
        if context is not None and (called := self.called()) is not None:
            return modules["to_out"](self._attend_shard(called, q, k, v, mask, inverted_attention))
        if not fused or self.why_weights() is not None or not are_plain(q, k, v):
            return modules["to_out"](self._attend(q, k, v, mask, inverted_attention))
        out = self._fused(q, k, v, mask, inverted_attention, is_self=context is None)
        return with_bias(*self.project_out(out))

    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        inverted: bool = False,
        is_self: bool = True,
    ) -> Tensor:
        """Attention by ops that never store the weights ``[B, H, N, M]``.

        Args:
            q: ``[B, N, H d]``.
            k, v: ``[B, M, H d]``.
            mask: bool ``[B, M]``, True where a token may be attended to. Default: all.
            inverted: softmax over the queries, then normalised over the tokens. Default: False.
            is_self: whether the tokens are the queries themselves, as in self-attention. Default: True.

        Returns:
            ``[B, N, H d]``.
        """
        q, k, v = (self.split_heads(t) for t in (q, k, v))
        if not is_self or mask is not None or inverted:
            out = cross_attention(q, k, v, mask, self.active_dropout, inverted, scale=self.scale)
            return out.transpose(1, 2).flatten(2)
        out = self_attention(q, k, v, self.active_dropout, self.scale)
        return out.transpose(1, 2).flatten(2)

    def _attend_shard(
        self, called: CalledAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, inverted: bool
    ) -> Tensor:
        """Attention to the tokens of several processes, of which ``k``, ``v [B, M, H d]`` are this one's: ``[B, N, H d]``."""
        why = self.why_weights()
        if called.first is None and self.active_dropout > 0:
            why = "dropout would drop weights of groups"
        if self.queries_contribute_kv:
            why = "the queries join the keys and values"
        if why is not None:
            raise RuntimeError(
                f"shard: expected attention to sharded tokens whose weights need not be built, got one where {why}; change "
                "that, or unshard the model"
            )
        (q,) = called.shard.local(q)
        q, k, v = (self.split_heads(t) for t in (q, k, v))
        q = q.expand(k.shape[0], -1, -1, -1)
        seed = seed_from(dropout_seed(self.active_dropout, q.device), called.first or 0)
        found: Any
        if k.shape[2] == 0:  # this process has none; zeros with gradients of zero
            zero = sum(t.flatten()[:0].sum() for t in (q, k, v))
            out = (q.new_zeros(*q.shape[:3], v.shape[3]) + zero).to(compute_dtype(q.dtype))
            found = out, lse_of(torch.full_like(out[..., 0], EMPTY_LSE))
        else:
            found = cross_attention_unchecked(
                q, k, v, mask, self.active_dropout, inverted, self.scale, return_lse=True, seed=seed
            )
        out, lse = (t.transpose(1, 2) for t in found)
        return called.shard.merge(out, lse, k.shape[2], inverted).flatten(2).to(q.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, inverted: bool) -> Tensor:
        """The same by torch's operators, as perceiver-pytorch computes it: weights ``[B H, N, M]`` are given to ``dropout``."""
        heads = self.heads
        q, k, v = (self.split_heads(t).flatten(0, 1) for t in (q, k, v))
        weight = torch.einsum("bid,bjd->bij", q, k) * self.scale
        if mask is not None:
            mask = mask.unsqueeze(1).expand(-1, heads, -1).flatten(0, 1).unsqueeze(1)
            weight = weight.masked_fill(~mask, -torch.finfo(weight.dtype).max)
        if inverted:
            weight = weight.softmax(dim=-2)
            weight = weight if mask is None else weight.masked_fill(~mask, 0.0)
            weight = F.normalize(weight, p=1, dim=-1, eps=1e-8)
        else:
            weight = weight.softmax(dim=-1)
        dropout: Any = self._modules.get("dropout") if self.drops else None
        weight = weight if dropout is None else dropout(weight)
        out = torch.einsum("bij,bjd->bid", weight, v)
        return out.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
