"""What stand-ins of all families ask before they run, and masks as they need them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.described import DescribedTensor
from perceiver_fast.layers.fusing import are_plain, watcher, why_not
from perceiver_fast.ops.derivatives import transformed


def why_not_now(*tensors: object) -> str | None:
    """Why no stand-in may run in the present modes or on these tensors, in words; None if it may."""
    found = watcher()
    if found is not None:
        return found
    if torch._C._is_any_autocast_enabled():
        return "autocast decides the dtype of every operator"
    if transformed():
        return "a transform of torch.func looks on"
    tensor: Any  # after the next lines, a tensor
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not DescribedTensor and not are_plain(tensor):
            return f"{type(tensor).__name__} is no plain tensor"
        if tensor.device.type == "meta" or not tensor.dtype.is_floating_point:
            return f"it runs on no tensors of {tensor.dtype} on {tensor.device.type}"
    return None


def why_dropout(dropout: Any) -> str | None:
    """Why attention weights have to be given to ``dropout``, in words; None if they need not."""
    if dropout is None or type(dropout) is nn.Identity:
        return None if dropout is None or why_not("dropout", dropout, nn.Identity) is None else "dropout has a hook"
    found = why_not("dropout", dropout, nn.Dropout)
    return "dropout drops all weights" if found is None and dropout.p >= 1 and dropout.training else found


def active_dropout(dropout: Any) -> float:
    """Probability of dropping a weight in the current mode."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def keep_of(mask: Tensor | None, batch: int, count: int, dtype: torch.dtype) -> tuple[Tensor | None, str | None]:
    """An additive mask as bool ``[B, M]``, True where a token may be attended to (None: everywhere), or why it cannot.

    Args:
        mask: ``[B or 1, 1, 1 or N, M or 1]``, zero where a token may be attended to and the least number where not.
        batch, count: B and M.
        dtype: of the logits.
    """
    if mask is None:
        return None, None
    if getattr(mask, "says_nothing", False):
        return None, None
    if torch.compiler.is_compiling():
        return None, "a mask's values are not known while a graph is traced"
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] not in (1, count) or mask.shape[0] not in (1, batch):
        return None, f"a mask of shape {tuple(mask.shape)} is no mask of tokens"
    if mask.requires_grad or not mask.is_floating_point():
        return None, "a mask is no additive constant"
    if mask.shape[2] != 1:
        if mask.stride(2) != 0 and bool((mask != mask[:, :, :1]).any()):
            return None, "a mask differs from query to query"
        mask = mask[:, :, :1]
    row = mask[:, 0, 0]
    keep = row == 0
    if bool(keep.all()):
        return None, None
    if not bool((keep | (row <= torch.finfo(mask.dtype).min)).all()):
        return None, "a mask is not of zeros and least numbers"
    if not bool(keep.any(-1).all()):
        return None, "a mask leaves an element no token, whose logits then have a gradient"
    if torch.finfo(mask.dtype).min > torch.finfo(dtype).min:
        return None, f"a mask in {mask.dtype} beside logits in {dtype}"
    return keep.expand(batch, count), None
