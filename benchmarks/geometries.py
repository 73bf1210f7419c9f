"""The shapes that are measured, named after the published models they come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.families import FAMILIES

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Geometry:
    """One model and the size of its input.

    Args:
        name: what the command line and the results call it.
        family: what it is a model of, a key of FAMILIES. Default: perceiver.
        batch: images, clips or clouds at once. Default: 1.
        sizes: the input's axes, n_1 .. n_A.
        channels: raw channels of a token. Default: 3.
        model: the other arguments of ``Perceiver``, the same for every implementation.
        rounds: timed calls at least; fewer where one takes many seconds. Default: 5.
        levels: what is measured on it: whole models, the op, or both. Default: both.
        default: whether it is measured when none is asked for by name. Default: True.
    """

    name: str
    sizes: tuple[int, ...]
    model: dict[str, Any] = field(hash=False)
    channels: int = 3
    rounds: int = 5
    levels: tuple[str, ...] = ("model", "op")
    default: bool = True
    family: str = "perceiver"
    batch: int = 1

    @property
    def tokens(self) -> int:
        """Number of tokens, M."""
        return prod(self.sizes)

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of ``Perceiver``."""
        return {"input_axis": len(self.sizes), "input_channels": self.channels, **self.model}

    @property
    def logits_bytes(self) -> int:
        """Size of one float32 N x M matrix: what perceiver-pytorch builds several of in every cross-attention."""
        return FLOAT32_BYTES * self.batch * self.model["num_latents"] * self.tokens

    @property
    def eager_bytes(self) -> int:
        """About the most memory that a training step of perceiver-pytorch holds at once.

        Per cross-attention it keeps the normalised tokens, the logits and the weights for the backward pass; the
        built tokens are shared, and one backward holds about two more of each.
        """
        codes = 2 * self.model.get("num_freq_bands", 0) + 1
        axes = {"perceiver": len(self.sizes), "points": self.channels, "io": 0}[self.family]
        built = FLOAT32_BYTES * self.batch * self.tokens * (self.channels + axes * codes)
        depth = max(1, self.model["depth"])  # PerceiverIO attends to its input once, whatever its depth
        return (depth + 3) * built + (2 * depth + 3) * self.logits_bytes

    def input(self) -> Tensor:
        """One random input ``[batch, *sizes, channels]``, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        draw = FAMILIES[self.family].draw
        return torch.cat([draw(self.sizes, self.channels, generator) for _ in range(self.batch)])


CROSS_ONLY = {
    "num_freq_bands": 64,
    "max_freq": 224.0,
    "depth": 1,
    "num_latents": 512,
    "latent_dim": 64,
    "self_per_cross_attn": 0,
    "num_classes": 10,
}
README = {
    "num_freq_bands": 6,
    "max_freq": 10.0,
    "depth": 6,
    "num_latents": 256,
    "latent_dim": 512,
    "self_per_cross_attn": 2,
    "num_classes": 1000,
}
IMAGENET = {
    "num_freq_bands": 64,
    "max_freq": 224.0,
    "depth": 8,
    "num_latents": 512,
    "latent_dim": 1024,
    "weight_tie_layers": True,
    "self_per_cross_attn": 6,
    "num_classes": 1000,
}
# A cross-attention and its feed-forward, in all families.
IO = {"depth": 0, "queries_dim": 64, "num_latents": 512, "latent_dim": 64}
POINTS = {**CROSS_ONLY, "max_freq": 1120.0}
IMAGE, VIDEO, AUDIO, CLOUD = (224, 224), (16, 224, 224), (61_440,), (50_000,)

GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("cross-only", IMAGE, CROSS_ONLY),
        Geometry("readme", IMAGE, README),
        Geometry("readme-4", IMAGE, README, rounds=3, levels=("model",), default=False, batch=4),
        Geometry("imagenet-lucid-1", IMAGE, {**IMAGENET, "depth": 1}, levels=("model",)),
        Geometry("imagenet-lucid", IMAGE, IMAGENET, rounds=3, levels=("model",), default=False),
        Geometry("audio-cross", AUDIO, CROSS_ONLY, channels=1, levels=("model",)),
        Geometry("audio", AUDIO, {**CROSS_ONLY, "latent_dim": 1024}, channels=1, levels=("model",), default=False),
        Geometry("points", CLOUD, POINTS, channels=3, levels=("model",), family="points"),
        Geometry("io-512", (50_176,), IO, channels=512, levels=("model",), family="io"),
        Geometry("io-32", (50_176,), IO, channels=32, levels=("model",), family="io"),
        Geometry("inverted", IMAGE, {**CROSS_ONLY, "inverted_cross_attn": True}, levels=("model",)),
        Geometry("video", VIDEO, CROSS_ONLY, rounds=3, default=False),
    )
}


def select(names: list[str], everything: bool) -> list[str]:
    """Names of the geometries to measure: ``names``, or all, or the default ones."""
    return names or [name for name, geometry in GEOMETRIES.items() if everything or geometry.default]
