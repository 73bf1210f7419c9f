"""The models and inputs that are explained, profiled and measured, named after the published ones they come from.

geometries.json is the table: of each its sizes, and the arguments of its model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.insight.names import TABLE
from perceiver_fast.models import Perceiver, PerceiverIO


class Points(nn.Module):
    """A :class:`Perceiver` of points without raw channels, called with their positions ``[B, M, input_channels]``."""

    def __init__(self, **arguments: Any):
        super().__init__()
        axes = arguments["input_channels"]
        self.model = Perceiver(**arguments | {"input_channels": 0, "input_axis": axes})

    def forward(self, coords: Tensor) -> Tensor:
        return self.model(coords.narrow(-1, 0, 0), coords=coords)


def _io(*, input_axis: int, input_channels: int, **arguments: Any) -> PerceiverIO:
    if input_axis != 1:
        raise ValueError(f"PerceiverIO: expected a geometry of one axis, got {input_axis}")
    return PerceiverIO(dim=input_channels, **arguments)


# What a geometry is a model of.
FAMILIES: dict[str, Callable[..., nn.Module]] = {"perceiver": Perceiver, "io": _io, "points": Points}


@dataclass(frozen=True)
class Geometry:
    """One model and the size of its input.

    Args:
        name: what command lines and results call it.
        sizes: the input's axes, n_1 .. n_A.
        model: the arguments of ``Perceiver`` but those of the input, the same for every implementation.
        channels: raw channels of a token. Default: 3.
        family: what it is a model of, a key of FAMILIES. Default: perceiver.
        source: where model and sizes come from. Default: made up here.
        cut: what it leaves out of that. Default: nothing.

    Example:
        >>> from perceiver_fast.insight.geometries import GEOMETRIES
        >>> GEOMETRIES["readme"].input(batch=2).shape
        torch.Size([2, 224, 224, 3])
    """

    name: str
    sizes: tuple[int, ...]
    model: dict[str, Any] = field(hash=False)
    channels: int = 3
    family: str = "perceiver"
    source: str = ""
    cut: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens, M."""
        return prod(self.sizes)

    @property
    def queries(self) -> int:
        """Number of latents, N."""
        return self.model["num_latents"]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of ``Perceiver``."""
        return {"input_axis": len(self.sizes), "input_channels": self.channels, **self.model}

    @property
    def heads(self) -> int:
        """Heads of the cross-attentions, H."""
        return self.model.get("cross_heads", 1)

    @property
    def dim_head(self) -> int:
        """Channels of each of these heads, d."""
        return self.model.get("cross_dim_head", 64)

    @property
    def encoded(self) -> bool:
        """Whether tokens have Fourier codes of their positions."""
        return self.family != "io" and self.model.get("fourier_encode_data", True)

    @property
    def token_channels(self) -> int:
        """Channels of a token as perceiver-pytorch builds it, C."""
        if not self.encoded:
            return self.channels
        codes = 2 * self.model["num_freq_bands"] + 1
        return self.channels * codes if self.family == "points" else self.channels + len(self.sizes) * codes

    @property
    def cross_attentions(self) -> int:
        """How many times the latents attend to the input."""
        return 1 if self.family == "io" else self.model["depth"]  # PerceiverIO does once, whatever its depth

    def one_layer(self) -> Geometry:
        """The same input and latents with one cross-attention and no layer of the latents alone."""
        few = {"depth": 0 if self.family == "io" else 1, "self_per_cross_attn": 0, "num_classes": 1}
        return replace(self, model=self.model | {key: few[key] for key in few.keys() & self.model.keys()})

    def build(self) -> nn.Module:
        """perceiver-fast's model, with random weights."""
        return FAMILIES[self.family](**self.arguments)

    def input(self, batch: int = 1) -> Tensor:
        """A random input ``[batch, *sizes, channels]``, the same at every call; of points, positions in [-1, 1]."""
        size, generator = (batch, *self.sizes, self.channels), torch.Generator().manual_seed(1)
        if self.family == "points":
            return torch.rand(size, generator=generator) * 2 - 1
        return torch.randn(size, generator=generator)

    def tiny(self) -> Geometry:
        """The same structure with few of everything."""
        small = {"num_latents": 6, "latent_dim": 16, "num_classes": 5, "depth": min(3, self.model["depth"])}
        small |= {"self_per_cross_attn": min(1, self.model.get("self_per_cross_attn", 0))}
        small = {key: value for key, value in small.items() if key in self.model}
        sizes = (5, 6, 4)[: len(self.sizes)]
        return replace(self, sizes=sizes, channels=min(self.channels, 9), model={**self.model, **small})


GEOMETRIES = {
    name: Geometry(name, tuple(facts.pop("sizes")), **facts) for name, facts in json.loads(TABLE.read_text()).items()
}
"""All by name, as geometries.json has them."""
