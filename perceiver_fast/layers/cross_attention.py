"""Cross-attention of the latents to described tokens, with PreNorm of both sides: where the package's kernels are used.

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

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.checks import check_data, check_mask
from perceiver_fast.layers.fusing import is_plain, why_not
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.plan import Layer, Plan, plan_cross_attention
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.grid_attention import grid_attention_unchecked
from perceiver_fast.ops.library import half_dtype, unless_autocast
from perceiver_fast.ops.linear import product_dtype
from perceiver_fast.ranges import layer_range
from perceiver_fast.tokens import DenseTokens, GridTokens, TokenGroups, Tokens, absorb_norm, merge_groups
from perceiver_fast.tracing import trainable

T = TypeVar("T")


def why_cross_attention_modules(layer: nn.Module) -> str | None:
    """What keeps a fused cross-attention from standing in for the layers of a PreNorm with a context, or None.

    The latents' side (``norm``, ``to_q``, ``to_out``) is called where it is more than its parameters; the tokens' side has to
    be plain.
    """
    fn, norm_context = layer._modules["fn"], layer._modules.get("norm_context")
    found = why_not("fn", fn, Attention, without_dropout.Attention)
    if found is not None:
        return found
    to_kv = fn._modules["to_kv"]
    found = (
        why_not("norm_context", norm_context, nn.LayerNorm) or why_not("fn.to_kv", to_kv, nn.Linear) or fn.why_weights()
    )
    if found is None and norm_context._parameters["bias"] is None:
        return "norm_context has no bias"
    if found is None and to_kv._parameters["bias"] is not None:
        return "fn.to_kv has a bias"
    return found


def describe_context(
    who: str, layer: nn.Module, x: Tensor, context: Tensor | Tokens | TokenGroups, mask: Tensor | None
) -> tuple[Tokens | TokenGroups, Tensor | None]:
    """The description of a context, and its mask; a tensor is checked, descriptions come from models that did so.

    Args:
        who: whom a caller knows, for messages.
        layer: the PreNorm that is to attend to it.
        x: latents.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, size or device; the message says expected, got and what to do.
    """
    if isinstance(context, (Tokens, TokenGroups)):
        return context, mask
    norm, norm_context = layer.norm, layer.norm_context
    width, channels = (
        getattr(n, "normalized_shape", (t.shape[-1],))[-1] for n, t in ((norm, x), (norm_context, context))
    )
    check_data(who, "x", x, norm_context.weight, axes=1, channels=width, channels_argument="dim")
    check_data(who, "context", context, norm_context.weight, axes=1, channels=channels, channels_argument="context_dim")
    if x.shape[0] != 1 and x.shape[0] != context.shape[0]:
        raise ValueError(
            f"{who}: expected x for a batch of {context.shape[0]}, like context, got {tuple(x.shape)}; "
            "give both the same batch"
        )
    return DenseTokens(trainable(context)), check_mask(who, mask, "context", context, context.shape[1:-1])


@layer_range
def cross_attention_branch(
    layer: nn.Module, stream: ResidualStream, tokens: Tokens | TokenGroups, mask: Tensor | None, inverted: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend, in the place of ``layer`` and its layers; only where nobody can tell.

    Args:
        layer: a PreNorm with a context.
        stream: the latents.
        tokens: what is attended to.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to. Groups of tokens bring their own.
        inverted: softmax over the latents, then normalised over the tokens.

    Returns:
        ``[B, N, D]`` before the bias of ``to_out``, and the bias; where ``to_out`` has to be called, what it returns and None.
    """
    return FusedCrossAttention(layer).attend(stream, tokens, mask, inverted)


class FusedCrossAttention:
    """The parameters of a PreNorm with a context, and attention computed from them, for one call.

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
            Layer(queries, fn.heads, self.dim_head, fn.active_dropout, inverted, lse, fn.queries_contribute_kv, masked),
        )

    def attend(
        self, stream: ResidualStream, tokens: Tokens | TokenGroups, mask: Tensor | None, inverted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`cross_attention_branch`."""
        z = self._normalized(stream)
        if (looks := observer()) is not None:
            looks.attends(self.layer, z, tokens, mask, inverted)
        if isinstance(tokens, TokenGroups):
            out = self._attend_groups(z, tokens, inverted)
        else:
            out, _ = self._attend(z, tokens, mask, inverted)
        return self.fn.project_out(out.flatten(2).to(product_dtype(z)))

    def _normalized(self, stream: ResidualStream) -> Tensor:
        """The stream's LayerNorm; of learned latents it is kept in inference, and with it their queries."""
        if not is_plain(self.fn._modules["to_q"], nn.Linear):  # it is called, on all there is
            return self.norm(stream.value())
        learned, norm = stream.learned, self.norm
        if learned is None or not is_plain(norm, nn.LayerNorm):
            return stream.normalized(norm)
        sources, key = (learned, norm.weight, norm.bias), (norm.eps, product_dtype(learned))
        return self.fn.cache.get("latents", sources, lambda: stream.normalized(norm), key)

    def _attend(
        self, x: Tensor, tokens: Tokens, mask: Tensor | None, inverted: bool = False, lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, N, H, d]``, and the log-sum-exp of the logits ``[B, N, H]`` if asked for."""
        plan = self.plan(tokens, x.shape[1], inverted, lse, mask is not None)
        if (looks := observer()) is not None:
            looks.plans(self.layer, x, tokens, mask, inverted, lse, plan)  # a log-sum-exp is for merging groups alone
        mask = None if mask is None else mask.flatten(1)
        return getattr(self, f"_attend_{plan.path}")(x, tokens, mask, inverted, lse)

    def _attend_groups(self, x: Tensor, tokens: TokenGroups, inverted: bool) -> Tensor:
        if inverted or self.fn.queries_contribute_kv:
            raise ValueError(
                "PreNorm: expected plain attention to groups of tokens, got "
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
        codes = [axis.code for axis in tokens.codes]

        def basis():
            return self._split(*tokens.project(self.fn.to_kv, self.norm_context))

        key = tokens.features, tokens.compute
        keys, key_bias, values, beta = self._kept("basis", basis, codes, key)
        q, constant = self._queries(x, keys, key_bias)
        return q, constant, values.transpose(1, 2), beta

    def _kept(self, name: str, build: Callable[[], T], sources: Sequence[Tensor] = (), key: object = None) -> T:
        """``build()``, a product of the keys' and values' parameters and ``sources``; kept in inference."""
        fn, norm = self.fn, self.norm_context._parameters
        parameters = fn._modules["to_kv"]._parameters["weight"], norm["weight"], norm["bias"]
        with unless_autocast(parameters[0].device):
            return fn.cache.get(name, (*parameters, *sources), build, (key, fn.heads, fn.scale))

    def _split(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys ``[H, d, L]`` times the scale of the logits, and their bias ``[H, d]``; values and their bias, the same."""
        heads = (2, self.fn.heads, -1)
        (keys, values), (key_bias, value_bias) = weight.unflatten(0, heads), bias.unflatten(0, heads)
        scale = self.fn.scale
        return keys * scale, key_bias * scale, values, value_bias

    def _to_q(self, z: Tensor) -> Tensor:
        """``to_q(z)``, once for all groups of tokens."""
        if self._q is None:
            self._q = self.fn.project("to_q", z)
        return self._q

    def _queries(self, x: Tensor, keys: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
        """``to_q(x)`` times keys ``[B, H, N, L]``, and times their bias ``[B, H, N]``."""
        to_q, cache = self.fn._modules["to_q"], self.fn.cache

        def queries():
            q = self._to_q(x)
            with unless_autocast(x.device):
                q = q.to(keys.dtype).unflatten(-1, (self.fn.heads, -1))
                return torch.einsum("bnhd,hdl->bhnl", q, keys), torch.einsum("bnhd,hd->bhn", q, key_bias)

        if cache.holds("latents", x) and is_plain(to_q, nn.Linear) and to_q.bias is None:
            return cache.get("queries", (x, to_q.weight, keys, key_bias), queries)
        return queries()

    def _attend_grid(
        self, x: Tensor, tokens: GridTokens, mask: Tensor | None, inverted: bool, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        feat, heads, features = tokens.feat, self.fn.heads, tokens.features
        half = half_dtype(x.device, tokens.dtype)
        q, constant, values, beta = self.grid_tables(x, tokens)
        with unless_autocast(x.device):
            scale = tokens.scale(self.norm_context.eps)
            if inverted:  # a channel that is one after scaling carries the keys' bias
                feat = torch.cat([feat, 1 / scale.unsqueeze(-1)], -1)
                q = torch.cat([q[..., :features], constant.unsqueeze(-1), q[..., features:]], -1)
            q = q.flatten(1, 2).expand(feat.shape[0], -1, -1)
            mask = None if mask is None else mask.reshape(feat.shape[:-1])
            o, sums, kept = grid_attention_unchecked(
                q, feat, scale, mask, self.fn.active_dropout, inverted, heads, half
            )
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
        return torch.einsum("bhn,hd->bnhd", kept.unflatten(1, (self.fn.heads, -1)), beta)

    def _attend_absorbed(
        self, x: Tensor, tokens: DenseTokens, mask: Tensor | None, inverted: bool, lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads, dropout = self.fn.heads, self.fn.active_dropout
        half = half_dtype(x.device, tokens.context.dtype)
        dtype = tokens.compute

        def absorbed():
            return self._split(*absorb_norm(self.fn.to_kv, self.norm_context, dtype))

        keys, key_bias, values, beta = self._kept("absorbed", absorbed, key=dtype)
        q, constant = self._queries(x, keys, key_bias)
        with unless_autocast(x.device):
            z = tokens.normalized(self.norm_context.eps).to(dtype)
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
        q = self._to_q(x).to(kv.dtype).expand(kv.shape[0], -1, -1)
        x = x.expand(kv.shape[0], -1, -1)
        if self.fn.queries_contribute_kv:
            kv = torch.cat([fn.project("to_kv", x).to(kv.dtype), kv], 1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(mask.shape[0], x.shape[1]), mask], -1)
        q, k, v = (fn.split_heads(t) for t in (q, *kv.chunk(2, dim=-1)))
        out = cross_attention(q, k, v, mask, fn.active_dropout, inverted, scale=fn.scale, return_lse=lse)
        out, sums = out if lse else (out, None)
        return out.transpose(1, 2), sums.transpose(1, 2) if lse else None
