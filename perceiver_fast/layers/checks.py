"""Checks of what layers and models are called with: errors come before any work, and nothing is converted in silence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perceiver_fast.ops.checks import check_memory
from perceiver_fast.ops.library import autocast_dtype


def check_tensor(who: str, what: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{who}: expected {what} to be a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")


def check_channels(who: str, what: str, tensor: Tensor, layout: str, channels: int, argument: str) -> None:
    """Raise ValueError unless the last dimension is ``channels``, the value of the constructor's ``argument``."""
    if tensor.shape[-1] != channels:
        raise ValueError(
            f"{who}: expected {what} with {channels} channels last {layout}, got {tensor.shape[-1]}: "
            f"{tuple(tensor.shape)}; permute the channels to the end, or build the model with "
            f"{argument}={tensor.shape[-1]}"
        )


def check_device(who: str, what: str, tensor: Tensor, like: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is where ``like``, a parameter of the model, is."""
    if tensor.device != like.device and like.device.type != "meta":  # offloaded weights are on meta until called
        raise ValueError(
            f"{who}: expected {what} on {like.device}, where the model is, got {tensor.device}; "
            f"move one of them, e.g. {what}.to('{like.device}')"
        )


def check_real(who: str, what: str, tensor: Tensor, like: Tensor) -> None:
    """Raise unless ``tensor`` is real, and of the device and dtype of ``like``, a parameter of the model."""
    if not tensor.is_floating_point():
        raise TypeError(
            f"{who}: expected real floating-point {what}, got {tensor.dtype}; convert it, e.g. {what}.float() / 255 "
            "for 8-bit images, or torch.view_as_real for complex data"
        )
    check_device(who, what, tensor, like)
    if tensor.dtype != like.dtype and autocast_dtype(tensor.device) is None:
        raise TypeError(
            f"{who}: expected {what} of dtype {like.dtype}, like the model's parameters, got {tensor.dtype}; "
            f"convert one of them, e.g. {what}.to({like.dtype}), or use torch.autocast"
        )


def check_data(
    who: str,
    what: str,
    data: Tensor,
    like: Tensor,
    *,
    axes: int,
    channels: int,
    channels_argument: str,
    axes_argument: str | None = None,
) -> None:
    """Check ``data [batch, n_1, .., n_A, channels]``, A = ``axes``.

    Args:
        who, what: the model's name and the input's, for messages.
        data: what to check.
        like: a parameter of the model: its dtype and device are expected.
        axes, channels: what to expect.
        channels_argument, axes_argument: the constructor's arguments that set them; None if the axes are fixed.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    check_tensor(who, what, data)
    check_memory(f"{who}: {what}", data)
    layout = f"[batch, {', '.join(f'n_{a + 1}' for a in range(axes))}, {channels}]"
    if data.dim() != axes + 2:
        setting = f" ({axes_argument}={axes})" if axes_argument else ""
        other = f"build the model with another {axes_argument}" if axes_argument else "flatten the positions into one"
        raise ValueError(
            f"{who}: expected {what} of {axes + 2} dimensions {layout}{setting}, got {data.dim()}: "
            f"{tuple(data.shape)}; add the batch or channel dimension, or {other}"
        )
    check_channels(who, what, data, layout, channels, channels_argument)
    if 0 in data.shape[1:-1]:
        raise ValueError(
            f"{who}: expected at least one position on every axis {layout}, got {tuple(data.shape)}; "
            "drop empty inputs before the model"
        )
    check_real(who, what, data, like)


def check_mask(who: str, mask: Tensor | None, what: str, data: Tensor, sizes: torch.Size) -> Tensor | None:
    """Check a mask.

    Args:
        who, what: the model's name and that of the data, for messages.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, B may be 1 for a mask that the batch shares; or None.
        data: ``[B, *sizes, ..]``, what is masked.
        sizes: of its axes; M is their product.

    Returns:
        The mask for the whole batch, or None.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    if mask is None:
        return None
    check_tensor(who, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{who}: expected a bool mask (True where a token may be attended to), got {mask.dtype}; "
            "convert it with mask.bool()"
        )
    batch, tokens = data.shape[0], math.prod(sizes)
    if mask.dim() < 2 or (mask.shape[0] != 1 and mask.shape[0] != batch) or math.prod(mask.shape[1:]) != tokens:
        shapes = " or ".join(map(str, dict.fromkeys([(batch, tokens), (batch, *sizes)])))
        raise ValueError(
            f"{who}: expected mask of shape {shapes}, got {tuple(mask.shape)}; "
            "give one bool for every token of every batch element"
        )
    if mask.device != data.device:
        raise ValueError(
            f"{who}: expected mask on {data.device}, like {what}, got {mask.device}; move it, "
            f"e.g. mask.to('{data.device}')"
        )
    return mask if mask.shape[0] == batch else mask.expand(batch, *mask.shape[1:])
