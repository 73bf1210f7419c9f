"""A small model, its inputs, and the rows of a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import perceiver_fast as pf


def image_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(num_freq_bands=3, depth=2, max_freq=8.0, num_latents=6, latent_dim=12, num_classes=3)
    small |= dict(latent_heads=2, latent_dim_head=5, cross_dim_head=6)
    return pf.Perceiver(**(small | options)).double()


def images(seed: int, batch: int, rows: int = 10) -> Tensor:
    return torch.randn(batch, rows, 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def thirds(rows: int, rank: int, ranks: int) -> slice:
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)
