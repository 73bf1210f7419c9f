"""Tensors of harsh values: constant, tiny, huge, far from zero, of mixed size, with outliers."""

from __future__ import annotations

import random

import torch
from torch import Tensor

KINDS = (
    "normal", "normal", "normal", "constant", "constant tokens", "half constant", "scaled", "far", "far channels",
    "mixed", "outlier", "sparse", "one token differs", "small steps",
)  # fmt: skip
CONSTANTS = (0.0, 1.0, 255.0, -3.0, 1e-3, 1e6, 1e-30, 1e30)
MASKS = ("none", "none", "random", "all", "nothing", "one", "first nothing")


def draw_values(r: random.Random) -> dict:
    """The part of a case that says what numbers an input holds: a kind, and a magnitude as kinds use it."""
    kind = r.choice(KINDS)
    if kind.startswith("constant") or kind == "half constant":
        magnitude = r.choice(CONSTANTS)
    elif kind == "scaled":
        magnitude = 10.0 ** r.uniform(-30, 30)
    elif kind == "outlier":
        magnitude = 10.0 ** r.choice([2, 4, 8, 16, 30, 38])
    elif kind.startswith("far"):
        magnitude = 10.0 ** r.uniform(0, 4)
    else:
        magnitude = 1.0
    return dict(values=kind, magnitude=magnitude)


def fill(kind: str, magnitude: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers ``[B, .., F]``, float32, whose tokens are what is before the last dimension.

    Args:
        kind: one of KINDS.
        magnitude: the constant, the scale, the outlier or the mean over the standard deviation.
        shape: of the result.
        generator: of all that is random.
    """
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    token = torch.randn(shape[:-1] + (1,), generator=generator, dtype=torch.float64)
    pick = torch.rand(shape[:-1] + (1,), generator=generator) < 0.5
    if kind == "constant":
        x = torch.full_like(x, magnitude)
    elif kind == "constant tokens":
        x = (token * magnitude).float().double().expand(shape)
    elif kind == "half constant":
        x = torch.where(pick, torch.full_like(x, magnitude), x)
    elif kind == "scaled":
        x = x * magnitude
    elif kind == "far":
        x = x + magnitude
    elif kind == "far channels":
        x = x + magnitude * torch.randn(shape[-1:], generator=generator, dtype=torch.float64)
    elif kind == "mixed":
        x = x * 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 6 - 3)
    elif kind == "outlier" and x.numel():
        flat = x.reshape(-1, shape[-1]).clone()
        flat[len(flat) // 2] *= magnitude / flat[len(flat) // 2].abs().max().clamp_min(1.0)
        x = flat.view(shape)
    elif kind == "sparse":
        x = torch.where(torch.rand(shape, generator=generator) < 0.9, torch.zeros_like(x), x)
    elif kind == "one token differs" and x.numel():
        flat = torch.ones_like(x).reshape(-1, shape[-1])
        flat[-1] = x.reshape(-1, shape[-1])[-1]
        x = flat.view(shape)
    elif kind == "small steps":
        x = 1.0 + 1e-4 * x.round()
    return x.float()


def draw_mask(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """A mask ``[B, ..]``, one of MASKS; None for "none"."""
    if kind == "none":
        return None
    mask = torch.rand(shape, generator=generator) < 0.6
    if kind == "all":
        mask = torch.ones_like(mask)
    elif kind == "nothing":
        mask = torch.zeros_like(mask)
    elif kind == "one":
        mask = torch.zeros_like(mask)
        mask.flatten(1)[:, mask[0].numel() // 2] = True
    elif kind == "first nothing":
        mask[:1] = False
    return mask
