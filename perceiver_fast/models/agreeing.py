"""What processes that share a model's input have to have alike, and how a model asks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
from torch import nn

from perceiver_fast.layers.fusing import watcher
from perceiver_fast.shards.agreement import Look, Place


def agree(model: Any, look: Callable[[], Look]) -> tuple[Any, list[Place]]:
    """Look at this process' part of a sharded model's inputs, and tell the others: see ``shards.agreement.agree``.

    Args:
        model: has ``shard``.
        look: checks the part.
    """
    device = next(model.parameters()).device

    def all_alike() -> Look:
        sizes, alike, found = look()
        return Look(sizes, alike | mode_of(model, device), found)

    return model.shard.agree(model, all_alike)


def mode_of(model: nn.Module, device: torch.device) -> dict[str, object]:
    """What processes that share an input have to have alike beside it, by name; numbers stand for long lists.

    Layers that are called, since somebody hangs on them, send their gradients in other messages than fused ones.
    """
    training: list[object] = []
    layers: list[object] = []
    for name, module in model.named_modules():
        training.append((name, module.training, getattr(module, "p", None) if isinstance(module, nn.Dropout) else None))
        state = module.__dict__
        if state["_forward_pre_hooks_with_kwargs"] or state["_forward_hooks_with_kwargs"]:
            layers.append((name, "hooks that see keyword arguments"))
        if getattr(module, "norm_context", None) is not None:
            for inner, each in module.named_modules():
                state = each.__dict__
                hooked = bool(state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
                layers.append((f"{name}.{inner}", type(each).__name__, hooked))
    parameters = [(name, p.requires_grad, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return {
        "model": type(model).__name__, "training": model.training, "gradients": torch.is_grad_enabled(), "autocast": half,
        "training of its modules": crc32(repr(training).encode()), "parameters": crc32(repr(parameters).encode()),
        "hooks and classes of its cross-attentions": crc32(repr(layers).encode()), "modes": watcher(),
    }  # fmt: skip
