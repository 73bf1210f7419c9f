"""Fourier position encoding and the projection after it, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast.reference.layer_norm import smooth_layer_norm

LAYOUTS = ("perceiver-pytorch", "deepmind", "vecset")


def fourier_encode(coords: Tensor, frequencies: Tensor, layout: str = "perceiver-pytorch") -> Tensor:
    """Sines, cosines and the position itself, for every axis.

    Whole periods are subtracted from the phase before it is multiplied by pi. That subtraction is exact, so the result is
    right to the last digits of coords' dtype, however high the frequency.

    Args:
        coords: positions ``[.., A]``.
        frequencies: ``[A, K]``, in half periods a unit of position.
        layout: order of the channels. ``"perceiver-pytorch"``: for every axis sines, cosines, position.
            ``"deepmind"`` (transformers' Perceiver): all positions, then all sines, then all cosines, axis by axis.
            ``"vecset"`` (3DShape2VecSet): all sines, then all cosines, then all positions.

    Returns:
        ``[.., A (2 K + 1)]``, the dtype of coords.
    """
    phase = coords.unsqueeze(-1) * frequencies
    phase = math.pi * (phase - 2 * (phase / 2).round())
    sine, cosine = phase.sin(), phase.cos()
    if layout == "vecset":
        return torch.cat([sine.flatten(-2), cosine.flatten(-2), coords], -1)
    if layout == "deepmind":
        return torch.cat([coords, sine.flatten(-2), cosine.flatten(-2)], -1)
    return torch.cat([sine, cosine, coords.unsqueeze(-1)], -1).flatten(-2)


def fourier_projection(
    feat: Tensor | None,
    coords: Tensor,
    frequencies: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float | None = None,
    layout: str = "perceiver-pytorch",
    smooth: bool = False,
) -> Tensor:
    """``LayerNorm([feat, fourier_encode(coords)]) weight + bias``, with a LayerNorm that has no affine part.

    Args:
        feat: raw channels ``[B, M, F]``, or None.
        coords: positions ``[Bc, M, A]``, Bc = 1 or B, in the dtype that the encoding is computed in.
        frequencies: ``[A, K]``, the dtype of coords.
        weight: ``[C, D]``, rows in the order of layout, feat first. All after the encoding is computed in its dtype.
        bias: ``[D]`` or None.
        eps: LayerNorm's epsilon, or None for no LayerNorm.
        layout: see :func:`fourier_encode`.
        smooth: use :func:`perceiver_fast.reference.smooth_layer_norm`, whose derivatives of every order are right.

    Returns:
        ``[B, M, D]``, the dtype of weight.
    """
    z = fourier_encode(coords, frequencies, layout).to(weight)
    if feat is not None:
        z = torch.cat([feat, z.expand(feat.shape[0], -1, -1)], -1)
    if eps is not None:
        z = (smooth_layer_norm if smooth else F.layer_norm)(z, z.shape[-1:], eps=eps)
    out = z @ weight
    return out if bias is None else out + bias
