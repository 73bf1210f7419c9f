"""perceiver-pytorch's model of a geometry, as its users build it. Importing this does not import perceiver-pytorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perceiver_fast.insight.geometries import Geometry


class EncodedPoints(nn.Module):
    """A point cloud through perceiver-pytorch: positions are encoded, and the model is told that its input is."""

    def __init__(self, **arguments: Any):
        super().__init__()
        import perceiver_pytorch

        self.max_freq, self.bands = arguments["max_freq"], arguments["num_freq_bands"]
        channels = arguments["input_channels"] * (2 * self.bands + 1)
        encoded = arguments | {"fourier_encode_data": False, "input_channels": channels, "input_axis": 1}
        self.model = perceiver_pytorch.Perceiver(**encoded)

    def forward(self, coords: Tensor) -> Tensor:
        from perceiver_pytorch.perceiver_pytorch import fourier_encode

        return self.model(fourier_encode(coords, self.max_freq, self.bands).flatten(-2))


def peer_model(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch's model with random weights; its input is the geometry's.

    Raises:
        ImportError: perceiver-pytorch is not installed.
    """
    import perceiver_pytorch

    arguments = dict(geometry.arguments)
    if geometry.family == "points":
        return EncodedPoints(**arguments)
    if geometry.family == "io":
        del arguments["input_axis"]
        return perceiver_pytorch.PerceiverIO(dim=arguments.pop("input_channels"), **arguments)
    return perceiver_pytorch.Perceiver(**arguments)
