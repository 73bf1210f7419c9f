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


def peer_model(geometry: Geometry, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """perceiver-pytorch's model; its input is the geometry's.

    Args:
        geometry: what it is a model of.
        weights: a state dict of it, or of our model, which has the same names. Default: random weights.

    Raises:
        ImportError: perceiver-pytorch is not installed.

    Example:
        >>> from perceiver_fast.insight.geometries import GEOMETRIES
        >>> geometry = GEOMETRIES["readme"].tiny()
        >>> model = peer_model(geometry, geometry.build().state_dict())  # doctest: +SKIP
    """
    import perceiver_pytorch

    arguments = dict(geometry.arguments)
    if geometry.family == "points":
        model = EncodedPoints(**arguments)
    elif geometry.family == "io":
        del arguments["input_axis"]
        model = perceiver_pytorch.PerceiverIO(dim=arguments.pop("input_channels"), **arguments)
    else:
        model = perceiver_pytorch.Perceiver(**arguments)
    if weights is not None:
        model.load_state_dict(weights)
    return model
