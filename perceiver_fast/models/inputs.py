"""Checks of what a model is called with: clear errors first, nothing converted in silence."""

from __future__ import annotations

import torch
from torch import Tensor

from perceiver_fast.ops.library import autocast_dtype


def check_inputs(model, data: Tensor, mask: Tensor | None) -> Tensor | None:
    """Check ``data`` and ``mask`` against ``model``; return the mask flattened to ``[B, M]``.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    name = type(model).__name__
    if not isinstance(data, Tensor):
        raise TypeError(f"{name}: expected data to be a torch.Tensor, got {type(data).__name__}; use torch.as_tensor")
    axes = ", ".join(f"n_{a + 1}" for a in range(model.input_axis))
    layout = f"[batch, {axes}, {model.input_channels}]"
    if data.dim() != model.input_axis + 2:
        raise ValueError(
            f"{name}: expected data of {model.input_axis + 2} dimensions {layout} (input_axis={model.input_axis}), "
            f"got {data.dim()}: {tuple(data.shape)}; add the batch or channel dimension, or build the model with "
            "another input_axis"
        )
    if data.shape[-1] != model.input_channels:
        raise ValueError(
            f"{name}: expected data with {model.input_channels} channels last {layout}, got {data.shape[-1]}: "
            f"{tuple(data.shape)}; permute the channels to the end, or build the model with "
            f"input_channels={data.shape[-1]}"
        )
    if 0 in data.shape[1:-1]:
        raise ValueError(
            f"{name}: expected at least one position on every axis {layout}, got {tuple(data.shape)}; "
            "drop empty inputs before the model"
        )
    if not data.is_floating_point():
        raise TypeError(
            f"{name}: expected real floating-point data, got {data.dtype}; convert it, e.g. data.float() / 255 for "
            "8-bit images, or torch.view_as_real for complex data"
        )
    latents = model.latents
    if data.device != latents.device:
        raise ValueError(
            f"{name}: expected data on {latents.device}, where the model is, got {data.device}; "
            f"move one of them, e.g. data.to('{latents.device}')"
        )
    if data.dtype != latents.dtype and autocast_dtype(data.device) is None:
        raise TypeError(
            f"{name}: expected data of dtype {latents.dtype}, like the model's parameters, got {data.dtype}; "
            f"convert one of them, e.g. data.to({latents.dtype}), or use torch.autocast"
        )
    return None if mask is None else _check_mask(name, data, mask)


def _check_mask(name: str, data: Tensor, mask: Tensor) -> Tensor:
    batch, sizes = data.shape[0], data.shape[1:-1]
    tokens = sizes.numel()
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected mask to be a torch.Tensor, got {type(mask).__name__}; use torch.as_tensor")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected a bool mask (True where a token may be attended to), got {mask.dtype}; "
            "convert it with mask.bool()"
        )
    if mask.dim() < 2 or mask.shape[0] not in (1, batch) or mask.shape[1:].numel() != tokens:
        raise ValueError(
            f"{name}: expected mask of shape {(batch, tokens)} or {(batch, *sizes)}, got {tuple(mask.shape)}; "
            "give one bool for every token of every batch element"
        )
    if mask.device != data.device:
        raise ValueError(
            f"{name}: expected mask on {data.device}, like data, got {mask.device}; move it, "
            f"e.g. mask.to('{data.device}')"
        )
    return mask.flatten(1).expand(batch, -1)
