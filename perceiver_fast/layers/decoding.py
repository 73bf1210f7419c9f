"""A decoder's cross-attention for queries that are described, at the cost of their positions.

A query ``to_q(norm(token_m)) = scale_m (W basis_m) + b`` meets the keys of N latents as

    S[m, n] = scale_m (K_n W / sqrt(d)) basis_m + K_n b / sqrt(d)

with one table ``K W / sqrt(d)`` of N rows, so neither the queries' tensor nor their projection is built. Whatever is
linear after the attention moves to the values: ``to_out``, and a last projection that nothing stands before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.fusing import are_plain, watcher, why_not
from perceiver_fast.layers.pre_norm import PreNorm
from perceiver_fast.ops.grid_query_attention import (
    GRID_QUERY_ATTENTION,
    GridQueryAttentionCall,
    grid_query_attention_into,
    grid_query_attention_unchecked,
)
from perceiver_fast.ops.library import autocast_dtype, compute_dtype, unless_autocast
from perceiver_fast.tokens import Queries, Tokens


def why_decoder_modules(layer: nn.Module, queries: Queries) -> str | None:
    """Why :class:`FusedDecoder` may not stand in for a PreNorm with a context, in words; None if it may.

    The latents' side (``norm_context``, ``to_kv``) need not be plain: what is not is called.
    """
    found = watcher() or why_not("the decoder", layer, PreNorm)
    if found is not None:
        return found
    fn, norm = layer._modules["fn"], layer._modules["norm"]
    found = why_not("fn", fn, Attention, without_dropout.Attention) or why_not("norm", norm, nn.LayerNorm)
    if found is not None:
        return found
    if norm._parameters["bias"] is None:
        return "norm has no bias"
    if layer._modules.get("norm_context") is None:
        return "the decoder has no norm_context"
    if fn.queries_contribute_kv:
        return "the queries join the keys and values"
    found = (
        why_not("fn.to_q", fn._modules["to_q"], nn.Linear)
        or why_not("fn.to_out", fn._modules["to_out"], nn.Linear)
        or fn.why_weights()
    )
    if found is None and queries.embed is not None:
        found = why_not("embed", queries.embed, nn.Linear)
    if found is None and not are_plain(queries.feat):
        found = "feat is no plain tensor"
    return found


def decoder_choice(like: Tensor, queries: Queries) -> Choice:
    """The backend of the op that attends for described queries, and why not the others."""
    axes = len(queries.sizes)
    return GRID_QUERY_ATTENTION.choose(GridQueryAttentionCall(compute_dtype(like.dtype), like.device, axes))


class FusedDecoder:
    """One call of a decoder's cross-attention, computed from the parameters of a PreNorm with a context.

    Args:
        layer: the PreNorm, for which :func:`why_decoder_modules` is None.
        last: a plain linear layer that follows at once, and is applied too; or None.
        latents: what is attended to, ``[B, N, D]``.
        backend: what runs the op.
    """

    def __init__(self, layer: nn.Module, last: nn.Linear | None, latents: Tensor, backend: str):
        self.fn, self.norm, self.backend = layer._modules["fn"], layer._modules["norm"], backend
        self.compute = compute = compute_dtype(latents.dtype)
        self.dtype = autocast_dtype(latents.device) or latents.dtype
        k, v = self.fn.project("to_kv", layer.norm_context(latents)).chunk(2, dim=-1)
        with unless_autocast(latents.device):
            self.k, v = (self.fn.split_heads(t).to(compute) for t in (k, v))  # [B, H, N, d]
            self.k = self.k * self.fn.scale
            weight, self.bias = self._after(last)
            latents, heads, dim = self.k.shape[-2], self.k.shape[1], self.k.shape[-1]
            # Folded, a query costs as many multiply-adds a latent and head as there are channels out; else d, and then
            # a projection of all heads' results.
            self.folds = latents * len(weight) <= dim * (latents + len(weight))
            if self.folds:
                v = torch.einsum("bhnd,ohd->bhno", v, weight.unflatten(1, (heads, dim)))
            self.v, self.weight = v, weight

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return self.weight.shape[0]

    def _after(self, last: nn.Linear | None) -> tuple[Tensor, Tensor | None]:
        """The linear map after the attention weights: ``[O, H d]``, and its bias ``[O]`` or None."""
        out = self.fn._modules["to_out"]
        weight, bias = out.weight.to(self.compute), None if out.bias is None else out.bias.to(self.compute)
        if last is None:
            return weight, bias
        then = last.weight.to(self.compute)
        weight, bias = then @ weight, None if bias is None else then @ bias
        if last.bias is not None:
            bias = last.bias.to(self.compute) if bias is None else bias + last.bias.to(self.compute)
        return weight, bias

    def _arguments(self, queries: Tokens) -> dict:
        """Arguments of the op."""
        to_q, heads = self.fn._modules["to_q"], self.k.shape[1]
        basis = queries.basis(to_q, self.norm)
        bias = basis.bias if to_q.bias is None else basis.bias + to_q.bias
        tables = torch.einsum("bhnd,hdl->bhnl", self.k, basis.weight.to(self.compute).unflatten(0, (heads, -1)))
        return dict(
            tables=tables,
            feat=basis.feat.to(self.compute),
            v=self.v,
            scale=None if basis.scale is None else basis.scale.to(self.compute),
            bias=torch.einsum("bhnd,hd->bhn", self.k, bias.to(self.compute).unflatten(0, (heads, -1))),
            sum_heads=self.folds,
            grid=basis.grid,
            backend=self.backend,
        )

    def decode(self, queries: Tokens) -> Tensor:
        """The attention's result after all linear layers that follow, ``[B, Q, O]``."""
        with unless_autocast(self.k.device):
            out = grid_query_attention_unchecked(**self._arguments(queries), dropout=self.fn.active_dropout)
            if not self.folds:
                out = out.flatten(2) @ self.weight.T
            if self.bias is not None:
                out = out + self.bias
            return out.to(self.dtype)

    def decode_into(self, out: Tensor, queries: Tokens) -> None:
        """:meth:`decode` in inference, written to ``out [B, Q, O]``: where nothing is in the way without a copy."""
        if not self.folds or self.fn.active_dropout > 0:
            out.copy_(self.decode(queries))
            return
        with unless_autocast(self.k.device):
            grid_query_attention_into(out, **self._arguments(queries))
            if self.bias is not None:
                out.add_(self.bias)
