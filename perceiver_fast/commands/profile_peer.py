"""perceiver-pytorch's model of a geometry, its modules marked as ours mark themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from perceiver_fast.commands.peer_model import peer_model
from perceiver_fast.commands.profile_workload import CannotRun
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.ranges import open_range


def build(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch's model with random weights, every module of that package in a range of its name.

    Raises:
        CannotRun: it is not installed.
    """
    try:
        model = peer_model(geometry)
    except ImportError as error:
        raise CannotRun(
            f"expected perceiver-pytorch to be installed ({error}); pip install perceiver-pytorch"
        ) from None
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
