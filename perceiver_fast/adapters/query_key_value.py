"""Attention with ``query``, ``key`` and ``value`` between two norms: copies of transformers' ``PerceiverSelfAttention``.

Research code often carries a copy of transformers' file, changed a little. Names do not say what a class computes: every
one is tried first (trial.py).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from perceiver_fast.adapters.forwards import StandIn
from perceiver_fast.adapters.hugging_face import AttentionForward
from perceiver_fast.adapters.trial import trial

MODULES = {"layernorm1", "layernorm2", "query", "key", "value", "dropout"}
ARGUMENTS = ["hidden_states", "attention_mask", "inputs", "inputs_mask", "output_attentions"]


def match(module: nn.Module) -> type[StandIn] | tuple[str, str] | None:
    """The stand-in for attention of this family; what it looks like and why not; or None for any other module."""
    if set(module._modules) != MODULES or module._parameters or type(module).__module__.startswith("perceiver_fast."):
        return None
    named = [name for name in inspect.signature(type(module).forward).parameters if name != "head_mask"][1:]
    linear = all(hasattr(module._modules[name], "in_features") for name in ("query", "key", "value"))
    if named != ARGUMENTS or not linear or not hasattr(module, "num_heads"):
        return None
    if not hasattr(module, "qk_channels_per_head"):
        return "looks like attention", "it does not say how many channels a head has (qk_channels_per_head)"
    why = trial(module, AttentionForward, _inputs)
    return AttentionForward if why is None else ("looks like attention", why)


def _inputs(module: Any) -> list[dict]:
    """Random input of two batch elements; with tokens also masked."""
    x = torch.randn(2, 5, module.query.in_features, dtype=torch.float64)
    if type(module.layernorm2) is nn.Identity:
        return [dict(hidden_states=x)]
    tokens = torch.randn(2, 7, module.key.in_features, dtype=torch.float64)
    masked = x.new_zeros(2, 7).masked_fill(torch.arange(7) >= torch.tensor([[7], [4]]), torch.finfo(x.dtype).min)
    return [
        dict(hidden_states=x, inputs=tokens),
        dict(hidden_states=x, inputs=tokens, inputs_mask=masked[:, None, None]),
    ]
