"""Tokens on a grid: raw channels, and one code per axis and index."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from perceiver_fast.backends import Choice
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.fourier_projection import centred
from perceiver_fast.ops.grid_scale import GRID_SCALE, grid_scale_unchecked
from perceiver_fast.ops.library import autocast_dtype, compute_dtype, projected_dtype, unless_autocast
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tracing import known


class GridTokens(Tokens):
    """Tokens ``[x_m ; e_1(i_1) ; .. ; e_A(i_A)]``: raw channels on a grid, and one code per axis and index.

    Args:
        feat: raw channels ``[B, *sizes, F]``, floating point.
        codes: one :class:`perceiver_fast.tokens.fourier.AxisCodes` per axis, in float32 or float64.
    """

    kind = "grid tokens"

    def __init__(self, feat: Tensor, codes: tuple):
        self.dtype = feat.dtype
        self.feat = feat.to(compute_dtype(feat.dtype))
        self.codes = codes
        self._scale: dict[float, Tensor] = {}
        self._shifted: dict[torch.dtype, Tensor] = {}
        self._dense: DenseTokens | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """The grid's sizes, n_1 .. n_A."""
        return tuple(self.feat.shape[1:-1])

    @property
    def features(self) -> int:
        """Raw channels a token, F."""
        return self.feat.shape[-1]

    @property
    def is_shifted(self) -> bool:
        """Whether raw channels are so many that a token far from zero has a small variance beside its mean."""
        return self.features > self.channels - self.features

    @property
    def elements(self) -> int:
        """Channels of :meth:`shifted`: F, or F + 1."""
        return self.features + self.is_shifted

    def shifted(self, dtype: torch.dtype | None = None) -> Tensor:
        """The raw channels as products see them, ``[B, *sizes, F]``, or less their mean and the mean ``[B, *sizes, F + 1]``.

        Far from zero, products of the channels themselves lose the digits that LayerNorm is there to keep. The shift
        changes nothing else, so it has no gradient. In ``dtype``, by default that of :attr:`feat`: computed once for all
        layers, as :meth:`scale`.
        """
        dtype = dtype or self.feat.dtype
        if not self.is_shifted and dtype == self.feat.dtype:
            return self.feat
        shifted = self._shifted.get(dtype)
        if shifted is None or (torch.is_grad_enabled() and self.learns()):
            shifted = self.feat
            if self.is_shifted:
                mean = (shifted.detach() * (1 / self.features)).sum(-1, keepdim=True)  # a sum alone could overflow
                shifted = torch.cat([shifted - mean, mean], -1)
            shifted = shifted.to(dtype)
            if not shifted.requires_grad:
                self._shifted[dtype] = shifted
        return shifted

    @property
    def channels(self) -> int:
        return self.features + sum(code.code.shape[-1] for code in self.codes)

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        return (GRID_SCALE.choose(PointwiseCall(self.feat.dtype, self.feat.device)),)

    def projection_operations(self, width: int) -> float:
        tables = sum(known(code.code.shape[0]) * code.code.shape[1] for code in self.codes)
        return width * (tables + known(self.count) * (self.elements + len(self.codes) + 1))

    def scale(self, eps: float) -> Tensor:
        """LayerNorm's ``1 / sqrt(var + eps)`` of every token, ``[B, *sizes]``.

        Computed once for all layers of one eps; anew for each where a gradient flows through it, since a checkpointed
        layer computes its own again.
        """
        scale = self._scale.get(eps)
        if scale is None or (torch.is_grad_enabled() and self.learns()):
            mean = torch.cat([code.mean for code in self.codes])
            square = torch.cat([code.square for code in self.codes])
            widths = [code.code.shape[-1] for code in self.codes]
            scale = grid_scale_unchecked(self.feat, mean, square, widths, eps)
            if not scale.requires_grad:
                self._scale[eps] = scale
        return scale

    def project(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """The projection ``to_kv(norm(token))`` as a table: what every raw channel and every axis index adds to it.

        A token is a sum over the basis ``[x, onehot(i_1), .., onehot(i_A)]``, x as :meth:`shifted` has it. LayerNorm's
        centring and affine part are in the table; its scale is not, as every token has its own (:meth:`scale`).

        Returns:
            weight ``[D, L]``, L = elements + sum(sizes): a column for every channel of :meth:`shifted`, then one for every
            index of every axis; and bias ``[D]``. The projection of token m is ``scale_m (weight basis_m) + bias``.
        """
        feat, axes, bias = self._projected_parts(to_kv, norm)
        return torch.cat([feat, *(weight @ code.T for weight, code in axes)], dim=1), bias

    def _projected_parts(
        self, to_kv: nn.Linear, norm: nn.LayerNorm
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        """What :meth:`project` is made of: centred weights of the channels of :meth:`shifted` ``[D, elements]``, of every axis
        a weight ``[D, C_a]`` and the codes ``[n_a, C_a]`` that it multiplies, and the bias ``[D]``."""
        weight, bias = absorb_norm(to_kv, norm, self.feat.dtype, self.order)
        weight = centred(weight, 1)
        feat, *axes = weight.split([self.features, *(code.code.shape[-1] for code in self.codes)], dim=1)
        if self.is_shifted:  # the codes lack the shift; their columns' sum is minus that of the raw channels
            feat = torch.cat([feat, -weight[:, self.features :].sum(1, keepdim=True)], dim=1)
        return feat, [(axis, code.code) for axis, code in zip(axes, self.codes)], bias

    def basis(self, projection: nn.Linear, norm: nn.LayerNorm) -> Basis:
        with unless_autocast(self.device):
            return Basis(*self.project(projection, norm), self.shifted(), self.scale(norm.eps), True)

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        alike = to_kv.weight.dtype == self.dtype or autocast_dtype(self.device) is not None
        if self.half_product and alike:
            # Mostly raw channels: what is gained by codes that are not built is lost by more passes.
            return self._built().keys_values(to_kv, norm)
        with unless_autocast(self.device):
            feat, axes, bias = self._projected_parts(to_kv, norm)
            scale = self.scale(norm.eps).unsqueeze(-1)
            kv = self.shifted() @ feat.T
            in_place = not (is_compiling() or transformed() or scale.requires_grad)  # fresh memory costs more than sums
            for axis, (weight, code) in enumerate(axes):
                part = code @ weight.T  # [n_a, D]
                part = part.view(*(-1 if a == axis else 1 for a in range(len(axes))), kv.shape[-1])
                kv = kv.add_(part) if in_place else kv + part
            kv = kv.mul_(scale).add_(bias) if in_place else kv * scale + bias
        return kv.flatten(1, -2).to(projected_dtype(to_kv.weight))

    @property
    def half_product(self) -> bool:
        return self.is_shifted

    def _built(self) -> DenseTokens:
        """The tokens as a tensor, built once for all layers; anew for each where a gradient flows through it."""
        if torch.is_grad_enabled() and self.learns():
            return DenseTokens(self.materialize())
        if self._dense is None:
            self._dense = DenseTokens(self.materialize())
        return self._dense

    def sources(self) -> tuple[Tensor, ...]:
        return (self.feat, *(axis.code for axis in self.codes))

    def materialize(self) -> Tensor:
        batch, sizes = self.feat.shape[0], self.sizes
        parts = [self.feat]
        for axis, code in enumerate(self.codes):
            shape = [1] * (len(sizes) + 1) + [code.code.shape[-1]]
            shape[1 + axis] = sizes[axis]
            parts.append(code.code.view(shape).expand(batch, *sizes, -1))
        return self.in_order(torch.cat(parts, -1).flatten(1, -2).to(self.dtype))
