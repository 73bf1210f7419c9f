"""Attention with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``: perceiver-io's, and what is built like it.

perceiver-io 0.11 has a ``MultiHeadAttention`` with these four and, around it, ``CrossAttention`` with ``q_norm`` and ``kv_norm``.
It cannot be told from its names what a class computes, and many others use them: every one is tried first (trial.py).
Perceiver AR's attention is causal, rotates queries and keys, and keeps a cache: then its own code runs.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.attention import Parts, cross_attention, project, queries_side, self_attention
from perceiver_fast.adapters.conditions import active_dropout, why_dropout, why_not_now
from perceiver_fast.adapters.forwards import StandIn
from perceiver_fast.adapters.trial import trial
from perceiver_fast.layers.fusing import is_called

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


class ProjectedAttention(StandIn):
    """``MultiHeadAttention.forward``: what asks and what is attended to come normalised."""

    kind = "attention"
    covers = True

    @property
    def attention(self) -> Any:
        """The module with the four projections."""
        return self.module

    def parts(self) -> Parts:
        """The parts of the attention, now."""
        modules = self.attention._modules
        return Parts(
            heads=self.attention.num_heads,
            scale=self.attention.dp_scale,
            dropout=active_dropout(modules.get("dropout")),
            norm=None,
            norm_context=None,
            to_q=modules["q_proj"],
            to_kv=(modules["k_proj"], modules["v_proj"]),
        )

    def why_not(self, x_q: Any = None, x_kv: Any = None, pad_mask: Any = None, **others: Any) -> str | None:
        attention = self.attention
        asked = [name for name, value in others.items() if value is not None]
        if asked:
            return f"arguments {', '.join(asked)}"
        if getattr(attention, "causal_attention", False):
            return "it is causal"
        if type(attention.num_heads) is not int or type(attention.dp_scale) not in (int, float):
            return "its heads or scale are no plain numbers"
        found = why_dropout(attention._modules.get("dropout"))
        if found is not None:
            return found
        for t in (x_q, x_kv):
            if not isinstance(t, Tensor) or t.dim() != 3 or 0 in t.shape:
                return "its arguments are of other kinds"
        if x_q.shape[0] not in (1, x_kv.shape[0]) or x_q.dtype != x_kv.dtype:
            return "queries and tokens differ in batch or dtype"
        if pad_mask is not None:
            if type(pad_mask) is not Tensor or pad_mask.dtype != torch.bool or pad_mask.shape != x_kv.shape[:2]:
                return "a pad_mask that is no bool for every token"
        return why_not_now(x_q, x_kv)

    def run(self, x_q: Tensor, x_kv: Tensor, pad_mask: Tensor | None = None, **_: Any) -> Any:
        parts = self.parts()
        if x_q is x_kv and pad_mask is None:
            out, way, work = self_attention(parts, x_q)
        else:
            keep = None if pad_mask is None else ~pad_mask
            out, way, work = cross_attention(parts, queries_side(parts, x_q), x_kv, keep)
        self.note(way, *work)
        return self.packed(project(self.attention._modules["o_proj"], out))

    def packed(self, out: Tensor) -> Any:
        """The result as the class returns it: since perceiver-io 0.9 beside a cache."""
        made = getattr(sys.modules[type(self.attention).__module__], "ModuleOutput", None)
        if made is None or "kv_cache" not in inspect.signature(type(self.attention).forward).parameters:
            return out
        return made(last_hidden_state=out, kv_cache=None)


class NormedCrossAttention(ProjectedAttention):
    """``CrossAttention.forward``: norms of both sides, and the attention."""

    kind = "cross-attention"

    def __init__(self, module: nn.Module):
        super().__init__(module)
        inner: Any = module._modules["attention"]
        self.inner = type(inner), type(inner).forward

    @property
    def attention(self) -> Any:
        return self.module._modules["attention"]

    def parts(self) -> Parts:
        parts, modules = super().parts(), self.module._modules
        parts.norm, parts.norm_context = modules["q_norm"], modules["kv_norm"]
        return parts

    def why_not(self, x_q: Any = None, x_kv: Any = None, pad_mask: Any = None, **others: Any) -> str | None:
        attention, (kind, forward) = self.attention, self.inner
        if type(attention) is not kind or kind.forward is not forward:
            return f"attention is of class {type(attention).__name__}, or its forward was exchanged"
        if (found := is_called(attention)) is not None:
            return f"attention {found}"
        return super().why_not(x_q, x_kv, pad_mask, **others)


def match(module: nn.Module) -> type[StandIn] | tuple[str, str] | None:
    """The stand-in for attention of this family; what it looks like and why not; or None for any other module."""
    names = set(module._modules)
    if PROJECTIONS <= names <= PROJECTIONS | {"dropout"} and _fits(module):
        kind: type[ProjectedAttention] = ProjectedAttention
    elif names == {"q_norm", "kv_norm", "attention"} and _is_cross(module):
        kind = NormedCrossAttention
    else:
        return None
    why = trial(module, kind, _inputs)
    return kind if why is None else (f"looks like {kind.kind}", why)


def _fits(attention: Any) -> bool:
    names = list(inspect.signature(type(attention).forward).parameters)[1:]
    linear = all(isinstance(attention._modules[name], nn.Module) for name in PROJECTIONS)
    has = hasattr(attention, "num_heads") and hasattr(attention, "dp_scale") and not attention._parameters
    return linear and has and names[:2] == ["x_q", "x_kv"] and hasattr(attention.q_proj, "in_features")


def _is_cross(module: nn.Module) -> bool:
    attention: Any = module._modules["attention"]
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if not PROJECTIONS <= set(attention._modules) <= PROJECTIONS | {"dropout"} or not _fits(attention):
        return False
    return all(type(module._modules[n]) is nn.LayerNorm for n in ("q_norm", "kv_norm")) and names[:2] == ["x_q", "x_kv"]


def _inputs(module: nn.Module) -> list[dict]:
    """Random input of two batch elements, without and with padding."""
    attention: Any = module._modules.get("attention", module)
    x_q = torch.randn(2, 5, attention.q_proj.in_features, dtype=torch.float64)
    x_kv = torch.randn(2, 7, attention.k_proj.in_features, dtype=torch.float64)
    found = [dict(x_q=x_q, x_kv=x_kv)]
    if "pad_mask" in inspect.signature(type(module).forward).parameters:
        found.append(dict(x_q=x_q, x_kv=x_kv, pad_mask=torch.arange(7) >= torch.tensor([[7], [4]])))
    return found
