"""perceiver-pytorch's model of a geometry, as its users build it."""

from __future__ import annotations

from typing import Any

import perceiver_pytorch
import torch
from perceiver_pytorch.perceiver_pytorch import fourier_encode
from torch import Tensor, nn

from perceiver_fast.geometries import Geometry


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


def _io(*, input_axis: int, input_channels: int, **arguments: Any) -> nn.Module:
    return perceiver_pytorch.PerceiverIO(dim=input_channels, **arguments)


THEIRS = {"perceiver": perceiver_pytorch.Perceiver, "io": _io, "points": EncodedPoints}


def eager(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch as it is, with the weights that all peers share."""
    torch.manual_seed(0)
    return THEIRS[geometry.family](**geometry.arguments)
