"""The inputs and the one set of weights that all sides of a case share."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.cases import Case
from benchmarks.sides import perturb
from perceiver_fast.insight.geometries import GEOMETRIES

AUTOCAST = {"bf16": torch.bfloat16, "fp32": None}
CACHES = 4  # how many L2 caches the rotated inputs fill
MOST_COPIES = 256
FUSED_FEATURES = 8  # up to this many raw channels a product with them is written as sums, which fuse with what follows


class Problem:
    """A case on a device: our model with its weights, and copies of the inputs to rotate through.

    At op level the inputs are latents ``[B, N, D]`` and an image ``[B, *sizes, F]``, at model level the image alone.
    """

    def __init__(self, case: Case, device: torch.device, dry: bool = False, cache_bytes: int = 0):
        geometry = GEOMETRIES[case.geometry].tiny() if dry else GEOMETRIES[case.geometry]
        self.case, self.device = case, device
        self.geometry = geometry if case.level == "model" else geometry.one_layer()
        torch.manual_seed(0)
        with torch.device(device):  # large models take seconds to initialise on a CPU
            self.model = self.geometry.build()
        self.layer = self.model.layers[0].cross_attn
        if case.level == "op":
            perturb(self.layer, self.layer.norm_context)
        self._draw(cache_bytes)

    def _draw(self, cache_bytes: int) -> None:
        geometry, batch = self.geometry, self.case.batch
        generator = torch.Generator(self.device).manual_seed(1)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, device=self.device, generator=generator)

        def one() -> tuple[tuple[Tensor, ...], Tensor]:
            image = draw(batch, *geometry.sizes, geometry.channels)
            if self.case.level == "model":
                return (image,), draw(batch, geometry.model["num_classes"])
            latents = batch, geometry.queries, geometry.model["latent_dim"]
            return (draw(*latents).requires_grad_(self.case.step), image), draw(*latents)

        first = one()
        held = sum(t.nbytes for t in (*first[0], first[1]))
        copies = min(MOST_COPIES, max(2, math.ceil(CACHES * cache_bytes / held)))
        self.copies = [first, *(one() for _ in range(copies - 1))]

    @property
    def checked(self) -> list[int]:
        """The batch elements whose results are checked: the first and the last."""
        return sorted({0, self.case.batch - 1})

    def autocast(self) -> AbstractContextManager:
        """What every side runs under: for bf16, autocast to it."""
        dtype = AUTOCAST[self.case.dtype]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    @cached_property
    def codes(self) -> Tensor:
        """``[1, *sizes, C - F]``, the position codes that dense peers at op level are given for nothing."""
        image = self.copies[0][0][-1][:1]
        built = self.model.describe(image).materialize().view(1, *self.geometry.sizes, -1)
        return built[..., self.geometry.channels :].contiguous()

    def build_tokens(self, image: Tensor) -> Tensor:
        """``[B, M, C]``, raw channels and codes joined: what dense attention needs of every image."""
        return torch.cat([image, self.codes.expand(image.shape[0], *self.codes.shape[1:])], -1).flatten(1, -2)

    def project_tokens(self, image: Tensor) -> Tensor:
        """Keys and values ``[B, M, 2 d]`` from built tokens."""
        return self.layer.fn.to_kv(self.layer.norm_context(self.build_tokens(image)))

    def project_tables(self, image: Tensor) -> Tensor:
        """The same from the axis tables, by this package."""
        return self.model.describe(image).keys_values(self.layer.fn.to_kv, self.layer.norm_context)

    @cached_property
    def write_keys_values(self) -> Callable[[Tensor], Tensor]:
        """Keys and values ``[B, M, 2 d']`` straight from the axis tables, compiled into few kernels.

        d' is d rounded up to a multiple of 8, which fast attention kernels ask for; the added channels are zero.
        """
        dtype = AUTOCAST[self.case.dtype] or torch.float32
        layer, padding = self.layer, -self.geometry.dim_head % 8

        def write(image: Tensor) -> Tensor:
            with torch.autocast(image.device.type, enabled=False):
                tokens = self.model.describe(image)
                weight, bias = tokens.project(layer.fn.to_kv, layer.norm_context)
                weight = F.pad(weight.unflatten(0, (2, -1)), (0, 0, 0, padding)).flatten(0, 1)
                bias = F.pad(bias.unflatten(0, (2, -1)), (0, padding)).flatten()
                features, *axes = weight.T.split([tokens.features, *tokens.sizes])
                if tokens.features <= FUSED_FEATURES:
                    kv = sum(image[..., f : f + 1] * features[f] for f in range(tokens.features))
                else:
                    kv = image @ features
                for axis, part in enumerate(axes):
                    kv = kv + part.view(*(-1 if a == axis else 1 for a in range(len(axes))), part.shape[-1])
                return (kv * tokens.scale(layer.norm_context.eps).unsqueeze(-1) + bias).to(dtype).flatten(1, -2)

        return torch.compile(write, dynamic=False)
