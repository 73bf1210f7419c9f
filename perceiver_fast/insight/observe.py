"""One attention layer of a model, seen as it is called: who attends to what, and with which weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.layers import Attention
from perceiver_fast.layers.cross_attention import FusedCrossAttention, why_cross_attention_modules
from perceiver_fast.layers.observer import Observer, observing
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.ops.library import compute_dtype, unless_autocast
from perceiver_fast.tokens import DenseTokens, GridTokens, PointTokens, TokenGroups, Tokens

PIECE = 16384  # tokens whose keys exist at once

# Logits [B, H, N, stop - start] of the tokens from start to stop.
Logits = Callable[[int, int], Tensor]


class _Source(NamedTuple):
    """Tokens that are attended to: their logits, their number and their mask ``[B, M]``."""

    logits: Logits
    count: int
    mask: Tensor | None = None


@dataclass
class Attended:
    """What one attention layer was called with.

    Args:
        layer: the layer, a PreNorm with a context or the latents' :class:`Attention`.
        z: what attends, normalised, ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares it.
        groups: what is attended to; of self-attention ``z`` itself.
        masks: ``[B, M_g]`` or None for each of them.
        inverted: softmax over ``z``, then normalised over the tokens.
        grouped: whether the groups came as :class:`TokenGroups`.
    """

    layer: nn.Module
    z: Tensor
    groups: Sequence[Tokens]
    masks: Sequence[Tensor | None] = (None,)
    inverted: bool = False
    grouped: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch size, heads, and the number of tokens that weights are over."""
        joined = is_cross_attention(self.layer) and self._projections.queries_contribute_kv
        own = self.z.shape[1] if joined else 0
        return self.groups[0].batch, self._projections.heads, own + sum(group.count for group in self.groups)

    def weights(self, rows: Sequence[int]) -> Tensor:
        """Attention weights of some of the N rows of ``z``, ``[B, H, rows, M]``, M the tokens of all groups joined.

        Nothing larger exists but the keys of PIECE tokens and, for inverted attention, their logits of all rows.
        """
        rows = list(rows)
        z = self.z if self.inverted else self.z[:, rows]
        sources = self._sources(z)
        batch, heads, total = self.shape
        out = torch.empty(batch, heads, len(rows), total, dtype=compute_dtype(z.dtype), device=z.device)
        for source, room in zip(sources, out.split([source.count for source in sources], -1)):
            for start in range(0, source.count, PIECE):
                stop = min(start + PIECE, source.count)
                logits = source.logits(start, stop)
                masked = None if source.mask is None else ~source.mask[:, None, None, start:stop]
                if masked is not None:
                    logits = logits.masked_fill(masked, -torch.finfo(logits.dtype).max)
                if self.inverted:
                    logits = logits.softmax(2)[:, :, rows]
                    logits = logits if masked is None else logits.masked_fill(masked, 0.0)
                room[..., start:stop] = logits
        # As the layers normalise: a row that is all masked is uniform, and of inverted attention zero.
        return F.normalize(out, p=1, dim=-1, eps=1e-8) if self.inverted else out.softmax(-1)

    @property
    def _projections(self) -> Attention:
        return self.layer.fn if is_cross_attention(self.layer) else self.layer

    def _sources(self, z: Tensor) -> list[_Source]:
        if isinstance(self.layer, Attention):
            return [_Source(self._dense_logits(z, self._own_keys), self.z.shape[1])]
        sources = []
        plain = why_cross_attention_modules(self.layer) is None
        if self.layer.fn.queries_contribute_kv:  # the queries come first, and are never masked
            sources.append(_Source(self._dense_logits(z, self._own_keys), self.z.shape[1]))
        for group, mask in zip(self.groups, self.masks):
            if plain and isinstance(group, GridTokens):
                logits = self._grid_logits(z, group)
            else:
                logits = self._dense_logits(z, partial(self._keys if plain else self._called_keys, group))
            sources.append(_Source(logits, group.count, mask))
        return sources

    def _own_keys(self, start: int, stop: int) -> Tensor:
        return self._projections.project("to_kv", self.z[:, start:stop]).chunk(2, -1)[0]

    def _keys(self, tokens: Tokens, start: int, stop: int) -> Tensor:
        """Keys of the tokens from start to stop, ``[B, m, H d]``."""
        if isinstance(tokens, PointTokens):
            feat, coords = tokens.feat[:, start:stop], tokens.coords[:, start:stop]
            tokens = PointTokens(feat, coords, tokens.frequencies)
        else:
            tokens = DenseTokens(tokens.context[:, start:stop])
        weight = self.layer.fn.to_kv.weight
        to_k = SimpleNamespace(weight=weight[: weight.shape[0] // 2])  # values are not needed
        return tokens.keys_values(to_k, self.layer.norm_context)

    def _called_keys(self, tokens: Tokens, start: int, stop: int) -> Tensor:
        """The same where layers are more than their parameters, and have to be called."""
        return self.layer.fn.to_kv(self.layer.norm_context(tokens.tensor()[:, start:stop])).chunk(2, -1)[0]

    def _dense_logits(self, z: Tensor, keys: Callable[[int, int], Tensor]) -> Logits:
        fn, dtype = self._projections, compute_dtype(z.dtype)
        q = fn.split_heads(fn.project("to_q", z)).to(dtype) * fn.scale

        def logits(start: int, stop: int) -> Tensor:
            k = fn.split_heads(keys(start, stop)).to(dtype)
            with unless_autocast(z.device):
                return q @ k.mT

        return logits

    def _grid_logits(self, z: Tensor, tokens: GridTokens) -> Logits:
        q, constant, *_ = FusedCrossAttention(self.layer).grid_tables(z, tokens)
        q_feat, *q_axes = q.split([tokens.features, *tokens.sizes], -1)
        feat = tokens.feat.flatten(1, -2).unsqueeze(1)
        scale = tokens.scale(self.layer.norm_context.eps).flatten(1)[:, None, None]

        def logits(start: int, stop: int) -> Tensor:
            indices = torch.unravel_index(torch.arange(start, stop, device=z.device), tokens.sizes)
            with unless_autocast(z.device):
                sums = q_feat @ feat[:, :, start:stop].mT
            for q_axis, index in zip(q_axes, indices):
                sums += q_axis[..., index]
            return sums * scale[..., start:stop] + constant.unsqueeze(-1)

        return logits


class _Stop(Exception):
    """Everything needed was seen."""


class _Look(Observer):
    """Keeps what one layer attends with, and stops the forward after it.

    Args:
        names: by a layer's id, its names in the model.
        wanted: index among the cross-attentions in the order they run, or a name.
        last: the last row of ``z`` that is needed. Default: all.
    """

    def __init__(self, names: dict[int, list[str]], wanted: int | str, last: int | None):
        self.names, self.wanted, self.last = names, wanted, last
        self.calls: Counter[int] = Counter()
        self.ran: list[str] = []
        self.seen: list[Attended] = []

    def attends(self, layer, z, tokens=None, mask=None, inverted=False, fused=True) -> None:
        own = self.names.get(id(layer))
        if own is None:  # of a model within that is not looked at
            return
        # A shared layer runs under its names in turn; called again, it goes on under the last.
        turn = self.calls[id(layer)]
        self.calls[id(layer)] += 1
        name = own[min(turn, len(own) - 1)]
        if is_cross_attention(layer) and turn < len(own):
            self.ran.append(name)
        wanted, ran = self.wanted, self.ran
        if not isinstance(wanted, str):
            wanted = ran[wanted] if 0 <= wanted < len(ran) else None
        if name == wanted:
            self.seen.append(_attended(layer, z, tokens, mask, inverted))
        rows = sum(part.z.shape[1] for part in self.seen)
        if self.seen and (name != wanted or (self.last is not None and rows > self.last)):
            raise _Stop


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All attention layers of a model by name, as :func:`perceiver_fast.explain` prints them; shared ones have several."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Attention) or is_cross_attention(module):
            found[name] = module
    inner = {id(module.fn) for module in found.values() if is_cross_attention(module)}  # their projections
    return {name: module for name, module in found.items() if id(module) not in inner}


def observe(who: str, model: nn.Module, layer: int | str, last: int | None, data, inputs: dict) -> Attended:
    """Run ``model(data, **inputs)`` as in inference up to a layer, and return what that was called with.

    Args:
        who: the caller, for messages.
        model: any model of this package, or one that holds its layers; its modes and hooks are left as they were.
        layer: index among the cross-attentions in the order they run, or a name.
        last: the last row of ``z`` that is needed, as decoders are called for parts of their queries. Default: all.

    Raises:
        TypeError, IndexError, ValueError: no such model or layer; and as the model's forward.
    """
    layers = attention_layers(model)
    if not layers:
        raise TypeError(f"{who}: expected a perceiver_fast model, got {type(model).__name__}")
    crosses = [name for name, module in layers.items() if is_cross_attention(module)]
    if isinstance(layer, str) and layer not in layers and f"{layer}.fn" in layers:
        layer = f"{layer}.fn"  # explain's name is that of the layer with its norm
    if isinstance(layer, str) and layer not in layers:
        raise ValueError(
            f"{who}: expected layer to be one of {', '.join(crosses or layers)}, got {layer!r}; "
            "pf.explain(model, data) names them all"
        )
    names: dict[int, list[str]] = {}
    for name, module in layers.items():
        names.setdefault(id(module), []).append(name)
    look = _Look(names, layer, last)
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), observing(look):
            model.eval()
            model(data, **inputs)
    except _Stop:
        pass
    finally:
        for module, mode in modes.items():
            module.training = mode
    seen, ran = look.seen, look.ran
    if not seen:
        if isinstance(layer, str):
            raise ValueError(f"{who}: layer {layer!r} did not run on this input; ran: {', '.join(ran) or 'none'}")
        expected = f"layer in 0..{len(ran) - 1}" if ran else "the name of a layer, as no cross-attention ran"
        raise IndexError(f"{who}: expected {expected}, got {layer}")
    first = seen[0]
    if len(seen) > 1:
        first.z = torch.cat([part.z for part in seen], 1)
    return first


def _attended(
    layer: nn.Module, z: Tensor, tokens: Tokens | TokenGroups | None, mask: Tensor | None, inverted: bool
) -> Attended:
    if tokens is None:
        return Attended(layer, z, [DenseTokens(z)], inverted=inverted)
    if isinstance(tokens, TokenGroups):
        if inverted or layer.fn.queries_contribute_kv:
            raise ValueError("PreNorm: expected plain attention to groups of tokens")  # as its forward does
        return Attended(layer, z, tokens.groups, tokens.masks, inverted, grouped=True)
    return Attended(layer, z, [tokens], [None if mask is None else mask.flatten(1)], inverted)
