"""A decoder's cross-attention for queries that are described, at the cost of their positions.

A query ``to_q(norm(token_m)) = scale_m (W basis_m) + b`` meets the keys of N latents as

    S[m, n] = scale_m (K_n W / sqrt(d)) basis_m + K_n b / sqrt(d)

with one table ``K W / sqrt(d)`` of N rows, so neither the queries' tensor nor their projection is built. Whatever is
linear after the attention moves to the values: ``to_out``, and a last projection that nothing stands before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice, forced_backend
from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.described import why_not_described
from perceiver_fast.layers.fusing import watcher, why_not
from perceiver_fast.layers.plan import FLOAT, Plan
from perceiver_fast.layers.pre_norm import PreNorm
from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.cross_attention import CROSS_ATTENTION, CrossAttentionCall
from perceiver_fast.ops.grid_query_attention import (
    GRID_QUERY_ATTENTION,
    GridQueryAttentionCall,
    grid_query_attention_into,
    grid_query_attention_unchecked,
    grid_query_attention_work,
)
from perceiver_fast.ops.library import autocast_dtype, compute_dtype, half_dtype, unless_autocast
from perceiver_fast.ops.work import Work, attention_work
from perceiver_fast.tokens import Description, GridDescription, Tokens


def why_decoder_modules(layer: nn.Module, queries: Description) -> str | None:
    """Why :class:`FusedDecoder` may not stand in for a PreNorm with a context, in words; None if it may.

    The latents' side (``norm_context``, ``to_kv``) need not be plain: what is not is called.
    """
    found = watcher() or why_not("the decoder", layer, PreNorm)
    if found is not None:
        return found
    modules: dict[str, Any] = layer._modules
    fn, norm = modules["fn"], modules["norm"]
    found = why_not("fn", fn, Attention, without_dropout.Attention) or why_not("norm", norm, nn.LayerNorm)
    if found is not None:
        return found
    if norm._parameters["bias"] is None:
        return "norm has no bias"
    if modules.get("norm_context") is None:
        return "the decoder has no norm_context"
    if fn.queries_contribute_kv:
        return "the queries join the keys and values"
    found = (
        why_not("fn.to_q", fn._modules["to_q"], nn.Linear)
        or why_not("fn.to_out", fn._modules["to_out"], nn.Linear)
        or fn.why_weights()
    )
    return found or why_not_described(queries)


def plan_decoder(layer: nn.Module, last: nn.Linear | None, latents: Tensor, queries: Description) -> Plan:
    """Whether a decoder takes the description of its queries, or their tensor: the way with the least counted work.

    Args:
        layer: the PreNorm, for which :func:`why_decoder_modules` is None.
        last: a plain linear layer that follows at once; or None.
        latents: what is attended to, ``[B, N, D]``.
        queries: what attends.

    Raises:
        perceiver_fast.backends.BackendError: a forced backend cannot run either way.
    """
    fn: Any = layer._modules["fn"]
    dtype, device = compute_dtype(latents.dtype), latents.device
    batch, keys, heads = latents.shape[0], latents.shape[1], fn.heads
    dim = fn._modules["to_q"].weight.shape[0] // heads
    channels = fn._modules["to_out"].weight.shape[0]
    out = channels if last is None else last.weight.shape[0]
    on_grid, features = isinstance(queries, GridDescription), 0 if queries.feat is None else queries.feat.shape[-1]
    sizes, count = queries.sizes, queries.count

    described = GRID_QUERY_ATTENTION.choose(GridQueryAttentionCall(dtype, device, len(sizes) if on_grid else 0))
    if described.backend == "reference" and forced_backend() == "auto":
        why = "it forms the M x N weights, which attention of built queries need not"
        described = Choice(described.op, None, described.rejected | {"reference": [why]})
    elements = features if on_grid else queries.code_channels
    if not on_grid and queries.embed is not None:
        elements = min(elements + 1, queries.channels)
    length = elements + (sum(sizes) if on_grid else 0)
    values = out if folds(keys, dim, out) else dim
    work = grid_query_attention_work((batch, heads, keys, length), (1, *sizes, elements), (values,), on_grid)
    tables = batch * heads * keys * dim * length
    own = 0 if on_grid else count * elements**2  # codes of points, and the variance of what a layer makes of them
    after = 0 if values == out else batch * count * heads * dim * out
    ways = {"described": work + Work(tables + own + after, bytes=FLOAT * batch * count * out)}

    built = CROSS_ATTENTION.choose(
        CrossAttentionCall(
            dtype, device, fn.active_dropout, batch=batch, heads=heads, queries=count, dim=dim, value_dim=dim
        )
    )
    width = queries.channels
    embeds = 0 if queries.embed is None else count * queries.code_channels * width
    q, kv = (batch, heads, count, dim), (batch, heads, keys, dim)
    projections = embeds + batch * count * (heads * dim * (width + channels) + (0 if last is None else channels * out))
    # Queries are written, normalised and projected; the results of attention and of to_out are written and read.
    traffic = FLOAT * batch * count * 2 * (2 * width + 2 * heads * dim + channels)
    ways["built"] = attention_work(q, kv, kv) + Work(projections, bytes=traffic)
    if described.backend is None or (forced_backend() == "auto" and ways["built"].cost < ways["described"].cost):
        return Plan("built", built, ways, grid=described)
    return Plan("described", described, ways)


def folds(latents: int, dim: int, out: int) -> bool:
    """Whether the linear map after attention is applied to the values: O multiply-adds a pair, not d and then a product.

    Args:
        latents: N.
        dim: channels of a head, d.
        out: channels after the map, O.
    """
    return latents * out <= dim * (latents + out)


class FusedDecoder:
    """One call of a decoder's cross-attention, computed from the parameters of a PreNorm with a context.

    Args:
        layer: the PreNorm, for which :func:`why_decoder_modules` is None.
        last: a plain linear layer that follows at once, and is applied too; or None.
        latents: what is attended to, ``[B, N, D]``.
        backend: what runs the op.
    """

    def __init__(self, layer: nn.Module, last: nn.Linear | None, latents: Tensor, backend: str):
        modules: dict[str, Any] = layer._modules
        self.fn: Attention = modules["fn"]
        self.norm: nn.LayerNorm = modules["norm"]
        self.backend = backend
        k, v = self.fn.project("to_kv", modules["norm_context"](latents)).chunk(2, dim=-1)
        self._prepare(latents, self.fn.split_heads(k), self.fn.split_heads(v), last)

    def _prepare(self, latents: Tensor, k: Tensor, v: Tensor, last: nn.Linear | None) -> None:
        """What all queries share, from keys ``[B, H, N, d]`` and values ``[B, H, N, dv]`` of the latents."""
        self.compute = compute_dtype(latents.dtype)
        self.dtype = autocast_dtype(latents.device) or latents.dtype
        self.half = half_dtype(latents.device, latents.dtype)  # of values, and of raw channels, on GPUs
        with unless_autocast(latents.device):
            self.k, v = k.to(self.compute) * self.fn.scale, v.to(self.compute)
            self.weight, self.bias = self._after(last)
            self.folds = folds(v.shape[2], v.shape[3], len(self.weight))
            if self.folds:
                v = torch.einsum("bhnd,ohd->bhno", v, self.weight.unflatten(1, (v.shape[1], -1)))
            self.v = v

    @property
    def channels(self) -> int:
        """Channels of the result."""
        return self.weight.shape[0]

    def _after(self, last: nn.Linear | None) -> tuple[Tensor, Tensor | None]:
        """The linear map after the attention weights: ``[O, H d]``, and its bias ``[O]`` or None."""
        out: Any = self.fn._modules["to_out"]
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
        to_q: Any = self.fn._modules["to_q"]
        heads = self.k.shape[1]
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
            half=self.half,
            backend=self.backend,
        )

    def decode(self, queries: Tokens) -> Tensor:
        """The attention's result after all linear layers that follow, ``[B, Q, O]``."""
        with unless_autocast(self.k.device):
            return self._attended(self._arguments(queries))

    def _attended(self, arguments: dict) -> Tensor:
        """The op's result for :meth:`_arguments`, ``[B, Q, O]``, after all linear layers that follow."""
        with unless_autocast(self.k.device):
            out = grid_query_attention_unchecked(**arguments, dropout=self.fn.active_dropout)
            if not self.folds:
                out = out.flatten(2) @ self.weight.T.to(out.dtype)
            if self.bias is not None:
                out = out + self.bias.to(out.dtype)
            return out.to(self.dtype)

    def decode_into(self, out: Tensor, queries: Tokens) -> None:
        """:meth:`decode` in inference, written to ``out [B, Q, O]``: where nothing is in the way without a copy."""
        if not self.folds or self.fn.active_dropout > 0:
            out.copy_(self.decode(queries))
            return
        with unless_autocast(self.k.device):
            grid_query_attention_into(out, **self._arguments(queries))
            if self.bias is not None:
                check_memory("bias", self.bias)
                out.add_(self.bias)
