"""perceiver-pytorch's model of a geometry, its modules marked as ours mark themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from perceiver_fast.commands.profile_workload import CannotRun
from perceiver_fast.geometries import Geometry
from perceiver_fast.ranges import open_range


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


def build(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch's model with random weights, every module of that package in a range of its name.

    Raises:
        CannotRun: it is not installed.
    """
    try:
        import perceiver_pytorch
    except ImportError as error:
        raise CannotRun(
            f"expected perceiver-pytorch to be installed ({error}); pip install perceiver-pytorch"
        ) from None
    arguments = dict(geometry.arguments)
    if geometry.family == "points":
        model = EncodedPoints(**arguments)
    elif geometry.family == "io":
        del arguments["input_axis"]
        model = perceiver_pytorch.PerceiverIO(dim=arguments.pop("input_channels"), **arguments)
    else:
        model = perceiver_pytorch.Perceiver(**arguments)
    for name, module in model.named_modules():
        if name and type(module).__module__.startswith("perceiver_pytorch"):
            _mark(module, name)
    return model


def _mark(module: nn.Module, name: str) -> None:
    """Open a range around every call of a module, by hooks: it has no other ways to take that they could change."""
    opened: list[AbstractContextManager] = []

    def enter(*_) -> None:
        opened.append(open_range(name))
        opened[-1].__enter__()

    def leave(*_) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)
