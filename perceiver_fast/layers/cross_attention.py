"""Cross-attention of the latents to tokens, with PreNorm of both sides: where the package's kernels are used.

LayerNorm's affine part moves into the projection after it, ``W = to_kv gamma`` and ``b = to_kv beta``. Then there are
three ways (layers/plan.py says which is taken):

    grid       [K | V] = W' [I_F | E_1^T | .. | E_A^T], W' = W minus its row means (LayerNorm's centring is linear):
               keys and values of the basis [x, onehot, .., onehot];  q = to_q(x) K / sqrt(d);  out = o V^T + b_v
    absorbed   q = to_q(x) W_k / sqrt(d) attends to the normalised tokens themselves;  out = o W_v^T + b_v
    projected  keys and values are built:  to_kv(norm(tokens))

A bias on keys adds the same to all logits of a query, which a softmax over tokens does not notice; inverted attention
does, and gets it as one more channel. A bias on values counts as often as the weights sum to.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.plan import Layer, Plan, plan_cross_attention
from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.grid_attention import grid_attention_joined
from perceiver_fast.ops.library import autocast_dtype, half_dtype
from perceiver_fast.tokens import DenseTokens, GridTokens, TokenGroups, Tokens, absorb_norm, merge_groups


class CrossAttention(nn.Module):
    """Attention of ``x [B, N, D]`` to tokens; parameters as in perceiver-pytorch's PreNorm(Attention).

    Args:
        dim: channels of the latents, D.
        context_dim: channels of the tokens as perceiver-pytorch builds them, C.
        heads, dim_head, dropout: see :class:`Attention`.
        queries_contribute_kv: the queries join the tokens, as in perceiver-pytorch; needs context_dim == dim.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        dim_head: int,
        dropout: float = 0.0,
        queries_contribute_kv: bool = False,
    ):
        super().__init__()
        if queries_contribute_kv and context_dim != dim:
            raise ValueError(
                f"queries_contribute_kv: expected context_dim == dim, got {context_dim} and {dim}; the queries are "
                "projected to keys and values by the weights of the tokens"
            )
        self.queries_contribute_kv = queries_contribute_kv
        self.fn = Attention(dim, context_dim, heads=heads, dim_head=dim_head, dropout=dropout)
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim)

    def plan(
        self, tokens: Tokens, queries: int, inverted: bool = False, lse: bool = False, masked: bool = False
    ) -> Plan:
        """The way that a forward of ``queries`` latents takes in the current mode, and why not the others.

        ``lse`` says that the log-sum-exp is needed, as it is to merge groups of tokens, and ``masked`` that there is a mask.

        Raises:
            perceiver_fast.backends.BackendError: a forced backend cannot run it.
        """
        fn = self.fn
        return plan_cross_attention(
            tokens,
            Layer(queries, fn.heads, fn.dim_head, fn.active_dropout, inverted, lse, self.queries_contribute_kv, masked),
        )

    def forward(
        self, x: Tensor, tokens: Tokens | TokenGroups, mask: Tensor | None = None, inverted: bool = False
    ) -> Tensor:
        """Attend.

        Args:
            x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them.
            tokens: what is attended to.
            mask: bool ``[B, M]``, True where a token may be attended to. Groups of tokens bring their own.
            inverted: softmax over the latents, then normalised over the tokens.

        Returns:
            ``[B, N, D]``.
        """
        x = self.norm(x)
        if isinstance(tokens, TokenGroups):
            out = self._attend_groups(x, tokens, inverted)
        else:
            out, _ = self._attend(x, tokens, mask, inverted)
        return self.fn.to_out(out.flatten(2).to(autocast_dtype(x.device) or x.dtype))

    def _attend(
        self, x: Tensor, tokens: Tokens, mask: Tensor | None, inverted: bool = False, lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, N, H, d]``, and the log-sum-exp of the logits ``[B, N, H]`` if asked for."""
        path = self.plan(tokens, x.shape[1], inverted, lse, mask is not None).path
        return getattr(self, f"_attend_{path}")(x, tokens, mask, inverted, lse)

    def _attend_groups(self, x: Tensor, tokens: TokenGroups, inverted: bool) -> Tensor:
        if inverted or self.queries_contribute_kv:
            raise ValueError(
                "CrossAttention: expected plain attention to groups of tokens, got "
                f"{'inverted_attention' if inverted else 'queries_contribute_kv'}; join the groups into one tensor"
            )
        results = [self._attend(x, group, mask, lse=True) for group, mask in zip(tokens.groups, tokens.masks)]
        outs, lses = zip(*results)
        return merge_groups(outs, lses, [group.count for group in tokens.groups])

    def grid_tables(self, x: Tensor, tokens: GridTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the grid op needs of normalised latents ``x``, in the dtype it computes in.

        Returns:
            q ``[B, H, N, L]`` (or with B = 1), the keys' bias in the logits ``[B, H, N]``, the values of the basis
            ``[H, L, d]`` and their bias ``[H, d]``.
        """
        q = self.fn.to_q(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = tokens.project(self.fn.to_kv, self.norm_context)
            q, constant, values, beta = self._absorb(q, weight, bias)
        return q, constant, values.transpose(1, 2), beta

    def _absorb(self, q: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries times keys, the same for the keys' bias; values ``[H, d, L]`` and their bias."""
        heads = (2, self.fn.heads, self.fn.dim_head)
        q = q.to(weight.dtype).unflatten(-1, heads[1:]) * self.fn.dim_head**-0.5  # [B, N, H, d]
        (keys, values), (key_bias, value_bias) = weight.unflatten(0, heads), bias.unflatten(0, heads)
        constant = torch.einsum("bnhd,hd->bhn", q, key_bias)
        return torch.einsum("bnhd,hdl->bhnl", q, keys), constant, values, value_bias

    def _attend_grid(
        self, x: Tensor, tokens: GridTokens, mask: Tensor | None, inverted: bool, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        feat, heads, features = tokens.feat, self.fn.heads, tokens.features
        half = half_dtype(x.device, tokens.dtype)
        q, constant, values, beta = self.grid_tables(x, tokens)
        with torch.autocast(x.device.type, enabled=False):
            scale = tokens.scale(self.norm_context.eps)
            if inverted:  # a channel that is one after scaling carries the keys' bias
                feat = torch.cat([feat, 1 / scale.unsqueeze(-1)], -1)
                q = torch.cat([q[..., :features], constant.unsqueeze(-1), q[..., features:]], -1)
            q = q.flatten(1, 2).expand(feat.shape[0], -1, -1)
            mask = None if mask is None else mask.view(feat.shape[:-1])
            o, sums, kept = grid_attention_joined(q, feat, scale, mask, self.fn.active_dropout, inverted, heads, half)
            o = o.unflatten(1, (heads, -1))
            if inverted:
                o = torch.cat([o[..., :features], o[..., features + 1 :]], -1)
            out = torch.einsum("bhnl,hld->bnhd", o, values) + self._value_bias(beta, kept)
            if not lse:
                return out, None
            return out, sums.unflatten(1, (heads, -1)).transpose(1, 2) + constant.transpose(1, 2)

    def _value_bias(self, beta: Tensor, kept: Tensor | None) -> Tensor:
        """``[H, d]``, or times the sum of every query's weights ``[B, H N]``."""
        if kept is None:
            return beta
        return torch.einsum("bhn,hd->bnhd", kept.view(kept.shape[0], self.fn.heads, -1), beta)

    def _attend_absorbed(
        self, x: Tensor, tokens: DenseTokens, mask: Tensor | None, inverted: bool, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads, dropout = self.fn.heads, self.fn.active_dropout
        half = half_dtype(x.device, tokens.context.dtype)
        q = self.fn.to_q(x)
        with torch.autocast(x.device.type, enabled=False):
            z = tokens.normalized(self.norm_context.eps).to(tokens.compute)
            q, constant, values, beta = self._absorb(q, *absorb_norm(self.fn.to_kv, self.norm_context, z.dtype))
            counts = inverted or dropout > 0
            if counts:  # a channel of ones carries the keys' bias, and counts what weights sum to
                z = torch.cat([z, z.new_ones(1).expand(*z.shape[:-1], 1)], -1)
                q = torch.cat([q, constant.unsqueeze(-1)], -1)
            q = q.expand(z.shape[0], -1, -1, -1)
            if inverted:  # heads apart: the softmax runs over the queries of one
                z = z.unsqueeze(1).expand(-1, heads, -1, -1)
            else:
                q, z = q.flatten(1, 2).unsqueeze(1), z.unsqueeze(1)
            if half is not None:
                q, z = q.to(half), z.to(half)
            o = cross_attention(q, z, z.view(z.shape), mask, dropout, inverted, scale=1.0, return_lse=lse)
            o, sums = o if lse else (o, None)
            o = o.to(values.dtype)
            o = o.reshape(o.shape[0], heads, x.shape[1], o.shape[-1])
            kept = None
            if counts:
                o, kept = o[..., :-1], o[..., -1].flatten(1)
            out = torch.einsum("bhnc,hdc->bnhd", o, values) + self._value_bias(beta, kept)
            if not lse:
                return out, None
            # The keys' bias is in the logits when it rode along.
            sums = sums.view(o.shape[:3]).transpose(1, 2)
            return out, sums if counts else sums + constant.transpose(1, 2)

    def _attend_projected(
        self, x: Tensor, tokens: Tokens, mask: Tensor | None, inverted: bool, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        fn = self.fn
        kv = tokens.keys_values(fn.to_kv, self.norm_context)
        x = x.expand(kv.shape[0], -1, -1)
        if self.queries_contribute_kv:
            kv = torch.cat([fn.to_kv(x), kv], 1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(mask.shape[0], x.shape[1]), mask], -1)
        k, v = (fn.split_heads(t) for t in kv.chunk(2, dim=-1))
        out = cross_attention(fn.split_heads(fn.to_q(x)), k, v, mask, fn.active_dropout, inverted, return_lse=lse)
        out, sums = out if lse else (out, None)
        return out.transpose(1, 2), sums.transpose(1, 2) if lse else None
