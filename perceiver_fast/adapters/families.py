"""Families by structure: attention built like perceiver-pytorch's, by whatever name, and perceiver-pytorch's own models.

A ``PreNorm`` of these families is a module with ``norm`` and ``fn`` (and ``norm_context``), whose ``fn`` is attention with
``to_q``, ``to_kv`` and ``to_out``, or a feed-forward ``net`` of two linear layers around a GEGLU. That something looks like
this does not say what it computes. So a class that is not perceiver-pytorch's own is tried: a copy of the module, on
random input in float64, with and without a mask, against its own forward, outputs and gradients. Only what agrees is
accelerated; for the rest the report says what differed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perceiver_fast.adapters.attention import Parts, cross_attention, project, queries_side, self_attention
from perceiver_fast.adapters.conditions import active_dropout, why_dropout, why_not_now
from perceiver_fast.adapters.described import built
from perceiver_fast.adapters.forwards import StandIn
from perceiver_fast.adapters.perceiver_pytorch import PerceiverForward, is_perceiver
from perceiver_fast.adapters.trial import trial
from perceiver_fast.layers.fusing import is_called, why_not
from perceiver_fast.layers.residual_stream import normalize
from perceiver_fast.ops.feed_forward import feed_forward

KEYWORDS = ("context", "mask", "inverted_attention")
TRUSTED = "perceiver_pytorch."  # its classes need no trial


class PreNormForward(StandIn):
    """What both kinds of ``PreNorm`` have in common."""

    covers = True

    def __init__(self, module: nn.Module):
        super().__init__(module)
        fn: Any = module._modules["fn"]
        self.inner = type(fn), type(fn).forward

    def why_modules(self) -> str | None:
        """Why the modules inside have to be called, as far as both kinds share reasons."""
        fn = self.module._modules["fn"]
        kind, forward = self.inner
        if type(fn) is not kind or kind.forward is not forward:
            return f"fn is of class {type(fn).__name__}, or its forward was exchanged"
        found = is_called(fn)
        return f"fn {found}" if found else None


class AttentionPreNorm(PreNormForward):
    """``PreNorm(Attention)`` of perceiver-pytorch and of those built like it."""

    kind = "attention"

    def what(self) -> str:
        return "self-attention" if self.module._modules.get("norm_context") is None else "cross-attention"

    def parts(self) -> Parts:
        """The parts of the attention, now."""
        modules, fn = self.module._modules, self.module._modules["fn"]
        return Parts(
            heads=fn.heads,
            scale=fn.scale,
            dropout=active_dropout(fn._modules.get("dropout")),
            norm=modules["norm"],
            norm_context=modules.get("norm_context"),
            to_q=fn._modules["to_q"],
            to_kv=(fn._modules["to_kv"],),
        )

    def why_not(self, x: Any = None, context: Any = None, mask: Any = None, **others: Any) -> str | None:
        fn, has_norm = self.module._modules["fn"], self.module._modules.get("norm_context") is not None
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if asked:
            return f"arguments {', '.join(asked)}"
        found = self.why_modules() or why_dropout(fn._modules.get("dropout"))
        if found is not None:
            return found
        if type(fn.scale) not in (int, float) or type(fn.heads) is not int:
            return "its heads or scale are no plain numbers"
        if getattr(fn, "queries_contribute_kv", False):
            return "the queries join the keys and values"
        if not isinstance(x, Tensor) or x.dim() != 3 or 0 in x.shape or has_norm != (context is not None):
            return "its arguments are of other kinds"
        found = why_not_now(x, context)
        if found is not None or context is None:
            return found or ("self-attention has a mask" if mask is not None else None)
        if context.dim() != 3 or 0 in context.shape or context.shape[0] != x.shape[0] or context.dtype != x.dtype:
            return f"a context of shape {tuple(context.shape)} beside {tuple(x.shape)}"
        if mask is None:
            return None
        if type(mask) is not Tensor or mask.dtype != torch.bool or mask.numel() != context.shape[0] * context.shape[1]:
            return "a mask that is no bool for every token"
        return None

    def run(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **_: Any) -> Tensor:
        parts, to_out = self.parts(), self.module._modules["fn"]._modules["to_out"]
        x = built(x)
        if context is None:
            out, way, work = self_attention(parts, queries_side(parts, x).expand(x.shape[0], -1, -1))
        else:
            keep = None if mask is None else mask.reshape(context.shape[:2])
            out, way, work = cross_attention(parts, queries_side(parts, x), context, keep)
        self.note(way, *work)
        return project(to_out, out)


class FeedForwardPreNorm(PreNormForward):
    """``PreNorm(FeedForward)`` with a GEGLU."""

    kind = "feed-forward"

    def why_not(self, x: Any = None, **others: Any) -> str | None:
        if others:
            return f"arguments {', '.join(others)}"
        found = self.why_modules()
        if found is not None:
            return found
        if not isinstance(x, Tensor) or 0 in x.shape:
            return "its argument is of another kind"
        net = self.module._modules["fn"]._modules["net"]
        found = why_not_now(x) or why_not("fn.net", net, nn.Sequential)
        for at, layer in enumerate(net):
            found = found or (f"fn.net.{at} {is_called(layer)}" if is_called(layer) else None)
        first, _, second = list(net)[:3]
        found = found or why_not("fn.net.0", first, nn.Linear) or why_not("fn.net.2", second, nn.Linear)
        return found or (
            "fn.net has a linear layer without bias" if first.bias is None or second.bias is None else None
        )

    def run(self, x: Tensor) -> Tensor:
        wide, _, narrow, *after = self.module._modules["fn"]._modules["net"]
        z = normalize(self.module._modules["norm"], built(x))
        out = feed_forward(z, wide.weight, wide.bias, narrow.weight) + narrow.bias
        for dropout in after:
            out = F.dropout(out, dropout.p, dropout.training)
        self.note("GEGLU feed-forward as one op")
        return out


def match(module: nn.Module) -> type[StandIn] | tuple[str, str] | None:
    """The stand-in for a module of these families; what it looks like and why not; or None for any other module."""
    if is_perceiver(module):
        return PerceiverForward
    modules = module._modules
    fn, norm = modules.get("fn"), modules.get("norm")
    if fn is None or type(norm) is not nn.LayerNorm or not set(modules) <= {"fn", "norm", "norm_context"}:
        return None
    if type(module).__module__.startswith("perceiver_fast."):
        return None
    if _is_attention(fn):
        kind: type[PreNormForward] = AttentionPreNorm
    elif _is_feed_forward(fn):
        kind = FeedForwardPreNorm
    else:
        return None
    if type(module).__module__.startswith(TRUSTED) and type(fn).__module__.startswith(TRUSTED):
        return kind
    why = trial(module, kind, _inputs)
    return kind if why is None else ("looks like " + kind(module).what(), why)


def _is_attention(fn: nn.Module) -> bool:
    modules = fn._modules
    if not {"to_q", "to_kv", "to_out"} <= set(modules) <= {"to_q", "to_kv", "to_out", "dropout"}:
        return False
    if fn._parameters or not hasattr(fn, "heads") or not hasattr(fn, "scale"):
        return False
    names = list(inspect.signature(type(fn).forward).parameters)[1:]
    return all(isinstance(modules[name], nn.Linear) for name in ("to_q", "to_kv")) and names[:1] == ["x"]


def _is_feed_forward(fn: nn.Module) -> bool:
    net = fn._modules.get("net")
    if not isinstance(net, nn.Sequential) or len(fn._modules) != 1 or fn._parameters or len(net) not in (3, 4):
        return False
    if type(net[0]) is not nn.Linear or type(net[2]) is not nn.Linear or net[0].bias is None or net[2].bias is None:
        return False
    if len(net) == 4 and type(net[3]) is not nn.Dropout:
        return False
    return net[0].out_features == 2 * net[2].in_features


def _inputs(module: Any) -> list[dict]:
    """Random input of two batch elements; with a context also masked."""
    x = torch.randn(2, 5, module.norm.normalized_shape[-1], dtype=torch.float64)
    norm_context = module._modules.get("norm_context")
    if norm_context is None:
        return [dict(x=x)]
    context = torch.randn(2, 7, norm_context.normalized_shape[-1], dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    found = [dict(x=x, context=context)]
    if "mask" in inspect.signature(type(module._modules["fn"]).forward).parameters:
        found.append(dict(x=x, context=context, mask=mask))
    return found
