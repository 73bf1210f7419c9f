"""Tokens at arbitrary positions: point clouds, and long signals of one axis.

Their position codes do not split into one table an axis, as a grid's do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast import reference
from perceiver_fast.backends import Choice
from perceiver_fast.ops.fourier_projection import FOURIER_PROJECTION, fourier_projection_unchecked
from perceiver_fast.ops.library import compute_dtype, projected_dtype, unless_autocast
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.projected_attention import Projection
from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm
from perceiver_fast.tracing import known

ENCODING = 12  # a sine or a cosine takes the time of so many multiply-adds
MOST_CODES = 2**24  # numbers of normalised tokens that are kept for all layers of a call: 64 MB of float32


class PointTokens(Tokens):
    """Tokens ``[x_m ; Fourier code of every coordinate of p_m]``; the code exists only inside the projection kernel.

    Args:
        feat: raw channels ``[B, M, F]``, floating point.
        coords: float64 positions ``[B, M, A]``, or ``[1, M, A]`` when the whole batch shares them; on the CPU if the
            device of feat has no float64.
        frequencies: float64 ``[A, K]``, in half periods a unit of position; where coords are.
    """

    kind = "points"

    def __init__(self, feat: Tensor, coords: Tensor, frequencies: Tensor):
        self.feat, self.coords, self.frequencies, self.dtype = feat, coords, frequencies, feat.dtype
        self._normalized: dict[float, Tensor] = {}

    @property
    def channels(self) -> int:
        axes, bands = self.frequencies.shape
        return self.stored_channels + axes * (2 * bands + 1)

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        return (FOURIER_PROJECTION.choose(PointwiseCall(self.feat.dtype, self.device)),)

    def projection_operations(self, width: int) -> float:
        return known(self.count) * (self.channels * width + 2 * self.frequencies.numel() * ENCODING)

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        return self.projection(to_kv, norm).keys_values()

    def projection(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Projection:
        with unless_autocast(self.device):
            weight, bias = absorb_norm(to_kv, norm, compute_dtype(to_kv.weight.dtype), self.order)
        dtype = projected_dtype(to_kv.weight)
        return Projection(self.feat, self.coords, self.frequencies, weight.T, bias, norm.eps, dtype)

    def codes(self, eps: float | None = None, ones: bool = False) -> Tensor:
        """The tokens ``[B, M, C]`` in the description's own order, by the kernel that encodes and projects.

        Args:
            eps: of a LayerNorm without affine part that they go through. Default: none.
            ones: with one more channel, which is one: ``[B, M, C + 1]``.
        """
        with unless_autocast(self.device):
            same = torch.eye(self.channels + ones, dtype=self.compute, device=self.device)
            return self.products(same[: self.channels], same[-1] if ones else None, eps)

    def products(self, weight: Tensor, bias: Tensor | None, eps: float | None = None) -> Tensor:
        """The tokens, after a LayerNorm without affine part if there is an ``eps``, times ``weight [C, D]``: ``[B, M, D]``."""
        feat = self.feat if self.stored_channels else None
        found = fourier_projection_unchecked(feat, self.coords, self.frequencies, weight, bias, eps)
        return found.expand(self.batch, -1, -1)

    def basis(self, projection: nn.Linear, norm: nn.LayerNorm) -> Basis:
        with unless_autocast(self.device):
            return Basis(
                *absorb_norm(projection, norm, self.compute, self.order), self.normalized(norm.eps), None, False
            )

    def normalized(self, eps: float) -> Tensor:
        """:meth:`codes` with mean 0 and variance 1, ``[B, M, C]``.

        Computed once for all layers of one eps; anew for each where a gradient flows through it, since a checkpointed layer
        computes its own again.
        """
        if torch.is_grad_enabled() and self.learns():
            return self.codes(eps)
        normalized = self._normalized.get(eps)
        if normalized is None:
            normalized = self.codes(eps)
            if not normalized.requires_grad:
                self._normalized[eps] = normalized
        return normalized

    @property
    def absorbed_channels(self) -> int | None:
        """All channels, unless their codes would take much memory: keys and values can be built in pieces."""
        few = known(self.batch * self.count) * self.channels <= MOST_CODES
        return self.channels if few else None

    def absorbed_operations(self) -> float:
        return self.projection_operations(self.channels)

    def part(self, piece: slice) -> PointTokens:
        part = PointTokens(self.feat[:, piece], self.coords[:, piece], self.frequencies)
        part.order = self.order
        return part

    def sources(self) -> tuple[Tensor, ...]:
        return self.feat, self.coords

    def materialize(self) -> Tensor:
        code = reference.fourier_encode(self.coords, self.frequencies).to(self.feat)
        return self.in_order(torch.cat([self.feat, code.expand(self.feat.shape[0], -1, -1)], -1))
