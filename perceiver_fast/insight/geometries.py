"""The models and inputs that are explained, profiled and measured, named after the published ones they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

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


_CROSS_ONLY = dict(
    num_freq_bands=64, max_freq=224.0, depth=1, num_latents=512, latent_dim=64, self_per_cross_attn=0, num_classes=10,
)  # fmt: skip
_SMALL = dict(
    num_freq_bands=6, max_freq=8.0, depth=2, num_latents=16, latent_dim=32, latent_heads=2, latent_dim_head=16,
    num_classes=10,
)  # fmt: skip
_README = dict(
    num_freq_bands=6, max_freq=10.0, depth=6, num_latents=256, latent_dim=512, self_per_cross_attn=2, num_classes=1000,
)  # fmt: skip
_PAPER = dict(
    num_freq_bands=64, max_freq=224.0, depth=8, num_latents=512, latent_dim=1024, weight_tie_layers=True,
    self_per_cross_attn=6, num_classes=1000,
)  # fmt: skip
_ONCE = dict(_PAPER, depth=1, weight_tie_layers=False)
_DENSE = dict(_ONCE, fourier_encode_data=False)
_IO = dict(depth=0, queries_dim=64, num_latents=512, latent_dim=64)  # a cross-attention and its feed-forward
_IMAGE, _AUDIO = (224, 224), (61_440,)
_PERCEIVER = "Jaegle et al., Perceiver, ICML 2021"
_HALF_WIDE = "latent heads of 64 channels"
_SIX = f"6 of 48 (8 x 6 shared) latent layers; {_HALF_WIDE}"

GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("cross-only", _IMAGE, _CROSS_ONLY),
        Geometry("readme", _IMAGE, _README, source="perceiver-pytorch's README"),
        Geometry("imagenet-lucid", _IMAGE, _PAPER, source=f"{_PERCEIVER}, sec. 4.1, in perceiver-pytorch's layout"),
        Geometry("imagenet-lucid-1", _IMAGE, dict(_PAPER, depth=1), source="the same", cut="one of 8 blocks"),
        Geometry(
            "imagenet-paper", _IMAGE, dict(_PAPER, cross_dim_head=261), source=f"{_PERCEIVER}, sec. 4.1", cut=_HALF_WIDE
        ),
        Geometry(
            "hf-fourier", _IMAGE, dict(_ONCE, cross_dim_head=261), source="deepmind/vision-perceiver-fourier", cut=_SIX
        ),
        Geometry(
            "hf-conv", (55, 55), dict(_ONCE, max_freq=55.0, cross_dim_head=322), channels=64,
            source="deepmind/vision-perceiver-conv", cut=_SIX,
        ),
        Geometry(
            "hf-learned", _IMAGE, dict(_DENSE, cross_dim_head=512), channels=512,
            source="deepmind/vision-perceiver-learned", cut=_SIX,
        ),
        Geometry(
            "flow", (368, 496), channels=64,
            model=dict(_ONCE, max_freq=496.0, num_latents=2048, latent_dim=512, cross_dim_head=322, self_per_cross_attn=24),
            source="deepmind/optical-flow-perceiver", cut=f"no decoder; {_HALF_WIDE}; one highest frequency for both axes",
        ),
        Geometry(
            "kinetics", (52_097,), channels=704,
            model=dict(_DENSE, num_latents=784, latent_dim=512, cross_dim_head=704, self_per_cross_attn=8),
            source="deepmind/multimodal-perceiver", cut=f"tokens as the preprocessor leaves them; no decoder; {_HALF_WIDE}",
        ),
        Geometry(
            "language", (2048,), dict(_DENSE, num_latents=256, latent_dim=1280, cross_heads=8, cross_dim_head=160),
            channels=768, source="deepmind/language-perceiver",
            cut=f"6 of 26 latent layers; 160 channels of queries and keys for 32; {_HALF_WIDE}",
        ),
        Geometry("video", (16, 224, 224), dict(_ONCE, self_per_cross_attn=1), source="a long input"),
        Geometry("audio", _AUDIO, dict(_ONCE, self_per_cross_attn=1), channels=1, source="raw audio"),
        Geometry(
            "modelnet", (2048,), dict(_PAPER, max_freq=1120.0, depth=2), family="points", source=f"{_PERCEIVER}, sec. 4.3"
        ),
        Geometry("audio-cross", _AUDIO, _CROSS_ONLY, channels=1),
        Geometry("points", (50_000,), dict(_CROSS_ONLY, max_freq=1120.0), family="points"),
        Geometry("io-512", (50_176,), _IO, channels=512, family="io"),
        Geometry("io-32", (50_176,), _IO, channels=32, family="io"),
        Geometry("small", (8, 8), _SMALL, source="digits: calls cost more than what they compute"),
        Geometry("inverted", _IMAGE, dict(_CROSS_ONLY, inverted_cross_attn=True)),
    )
}  # fmt: skip
