"""What a geometry is a model of: how perceiver-pytorch's users build it, how ours do, and its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import perceiver_pytorch
import torch
from perceiver_pytorch.perceiver_pytorch import fourier_encode
from torch import Tensor, nn

import perceiver_fast


@dataclass(frozen=True)
class Family:
    """``theirs(**arguments)`` and ``ours(**arguments)`` build the models; ``draw(sizes, channels)`` an input ``[1, ..]``."""

    theirs: Callable[..., nn.Module]
    ours: Callable[..., nn.Module]
    draw: Callable[[tuple[int, ...], int, torch.Generator], Tensor]


class EncodedPoints(nn.Module):
    """A point cloud through perceiver-pytorch: positions are encoded, and the model is told that its input is."""

    def __init__(self, **arguments: Any):
        super().__init__()
        self.max_freq, self.bands = arguments["max_freq"], arguments["num_freq_bands"]
        channels = arguments["input_channels"] * (2 * self.bands + 1)
        encoded = arguments | {"fourier_encode_data": False, "input_channels": channels, "input_axis": 1}
        self.model = perceiver_pytorch.Perceiver(**encoded)

    def forward(self, coords: Tensor) -> Tensor:
        return self.model(fourier_encode(coords, self.max_freq, self.bands).flatten(-2))


class Points(nn.Module):
    """The same through perceiver-fast: no raw channels, three coordinates a point."""

    def __init__(self, **arguments: Any):
        super().__init__()
        axes = arguments["input_channels"]
        self.model = perceiver_fast.Perceiver(**arguments | {"input_channels": 0, "input_axis": axes})

    def forward(self, coords: Tensor) -> Tensor:
        return self.model(coords[..., :0], coords=coords)


def _grid(sizes: tuple[int, ...], channels: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, *sizes, channels, generator=generator)


def _positions(sizes: tuple[int, ...], channels: int, generator: torch.Generator) -> Tensor:
    return torch.rand(1, prod(sizes), channels, generator=generator) * 2 - 1


def _io(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(*, input_axis: int, input_channels: int, **arguments: Any) -> nn.Module:
        assert input_axis == 1
        return make(dim=input_channels, **arguments)

    return build


FAMILIES = {
    "perceiver": Family(perceiver_pytorch.Perceiver, perceiver_fast.Perceiver, _grid),
    "io": Family(_io(perceiver_pytorch.PerceiverIO), _io(perceiver_fast.PerceiverIO), _grid),
    "points": Family(EncodedPoints, Points, _positions),
}
