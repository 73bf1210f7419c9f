"""Tokens that are a linear map of described tokens: ``y_m = W [x_m ; e(p_m)] + b``, an embedding of position codes.

LayerNorm of them needs no y. With ``W_c`` and ``b_c`` centred over the D channels of y,

    LayerNorm(y_m) = r_m (W_c z_m + b_c)      1 / r_m^2 = |W_c z_m + b_c|^2 / D + eps

so a projection after it is a projection of the C channels of ``z_m = [x_m ; e(p_m)]``, and the variance a quadratic form
of them. On a grid that form is a sum over pairs of axes, of one table each. Source: this package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.float64 import in_float64
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.fourier_projection import centred
from perceiver_fast.ops.library import projected_dtype, unless_autocast
from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.points import PointTokens


class EmbeddedGrid(GridTokens):
    """Tokens of a grid after a linear layer.

    Args:
        grid: the tokens before it, of C channels.
        weight, bias: of the layer, ``[D, C]`` and ``[D]`` or None.
    """

    kind = "embedded grid tokens"

    def __init__(self, grid: GridTokens, weight: Tensor, bias: Tensor | None):
        super().__init__(grid.feat, grid.codes)
        self.dtype, self.inner, self.weight, self.bias = grid.dtype, grid, weight, bias

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    @property
    def is_shifted(self) -> bool:
        return False

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        return ()

    def scale(self, eps: float) -> Tensor:
        scale = self._scale.get(eps)
        if scale is None or (torch.is_grad_enabled() and self.learns()):
            scale = (self._variance() + eps).rsqrt().to(self.feat)
            if not scale.requires_grad:
                self._scale[eps] = scale
        return scale

    def _variance(self) -> Tensor:
        """The variance of every token's channels, float64 ``[B, *sizes]``: a quadratic form, in tables of axes and of pairs."""
        sizes, axes, width = self.sizes, len(self.sizes), self.weight.shape[0]
        codes = [in_float64(code.code) for code in self.codes]
        columns = in_float64(self.weight)
        if self.bias is not None:  # it meets a channel of the first axis that is one
            at = self.features + codes[0].shape[1]
            columns = torch.cat([columns[:, :at], in_float64(self.bias).unsqueeze(1), columns[:, at:]], 1)
            codes[0] = torch.cat([codes[0], codes[0].new_ones(len(codes[0]), 1)], 1)
        columns = centred(columns, 0)
        parts = [self.features, *(code.shape[1] for code in codes)]
        form = [
            rows.split(parts, 1) for rows in (columns.T @ columns / width).split(parts)
        ]  # of raw channels, then axes

        def over(t: Tensor, *at: int) -> Tensor:
            """A table of one axis or of two, as it is broadcast over the grid."""
            return t.reshape([sizes[a] if a in at else 1 for a in range(axes)])

        squares = [over(((code @ form[1 + a][1 + a]) * code).sum(1), a) for a, code in enumerate(codes)]
        pairs = [
            over(2 * codes[a] @ form[1 + a][1 + b] @ codes[b].T, a, b) for a in range(axes) for b in range(a + 1, axes)
        ]
        # An axis' own part goes with a pair that it is in, so that a grid of two axes has nothing to add up.
        for a, square in enumerate(squares if pairs else ()):
            at = max(0, a - 1)
            pairs[at] = pairs[at] + square
        total = (sum(pairs[1:], pairs[0]) if pairs else squares[0]).unsqueeze(0)
        if self.features:
            feat = in_float64(self.feat)
            meets = sum(over_axis(form[0][1 + a] @ code.T, a, axes) for a, code in enumerate(codes))  # [*sizes, F]
            total = total + (feat * (2 * meets + feat @ form[0][0])).sum(-1)
        return total.clamp_min(0).expand(self.feat.shape[:-1])

    def _projected_parts(
        self, to_kv: nn.Linear, norm: nn.LayerNorm
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Tensor]:
        weight, bias = absorb_norm(to_kv, norm, self.feat.dtype)
        weight = centred(weight, 1)
        product = weight @ self.weight.to(weight.dtype)
        feat, *parts = product.split([self.features, *(code.code.shape[-1] for code in self.codes)], dim=1)
        axes = [(axis, code.code) for axis, code in zip(parts, self.codes)]
        if self.bias is not None:  # it meets a channel of the first axis that is one
            axis, code = axes[0]
            added = (weight @ self.bias.to(weight.dtype)).unsqueeze(1)
            axes[0] = torch.cat([axis, added], 1), torch.cat([code, code.new_ones(len(code), 1)], 1)
        return feat, axes, bias

    def sources(self) -> tuple[Tensor, ...]:
        return (*super().sources(), self.weight, *(() if self.bias is None else (self.bias,)))

    def materialize(self) -> Tensor:
        return nn.functional.linear(self.inner.materialize(), self.weight, self.bias)


def over_axis(table: Tensor, axis: int, axes: int) -> Tensor:
    """``[F, n]`` of one axis as ``[1, .., n, .., 1, F]``."""
    return table.T.reshape(*(-1 if a == axis else 1 for a in range(axes)), table.shape[0])


class EmbeddedPoints(Tokens):
    """Tokens at given positions after a linear layer.

    Args:
        points: the tokens before it, of C channels.
        weight, bias: of the layer, ``[D, C]`` and ``[D]`` or None.
    """

    kind = "embedded points"

    def __init__(self, points: PointTokens, weight: Tensor, bias: Tensor | None):
        self.inner, self.feat, self.weight, self.bias = points, points.feat, weight, bias
        self.dtype = points.dtype

    @property
    def channels(self) -> int:
        return self.weight.shape[0]

    def uses(self, path: str, width: int) -> tuple[Choice, ...]:
        return self.inner.uses(path, width)

    @property
    def absorbed_channels(self) -> int:
        return self.inner.channels + (self.bias is not None)

    def absorbed_operations(self) -> float:
        return self.inner.projection_operations(2 * self.inner.channels)  # codes, and their variance

    def projection_operations(self, width: int) -> float:
        return self.inner.projection_operations(width + 2 * self.inner.channels)

    def part(self, piece: slice) -> EmbeddedPoints:
        return EmbeddedPoints(self.inner.part(piece), self.weight, self.bias)

    def basis(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Basis:
        with unless_autocast(self.device):
            columns = self.weight if self.bias is None else torch.cat([self.weight, self.bias.unsqueeze(1)], 1)
            middle = centred(in_float64(columns), 0)
            dtype, channels = self.inner.compute, self.inner.channels
            weight, bias = absorb_norm(to_kv, norm, dtype)
            if transformed() or (torch.is_grad_enabled() and self.learns()):
                feat = self.inner.codes(ones=self.bias is not None)  # the bias belongs to the channel of ones
                variance, root = variance_of_products(feat, middle.to(feat)), columns.to(dtype)
            else:  # W_c z = Q R z: one product gives R z, whose length is that of W_c z
                root, triangle = torch.linalg.qr(middle)
                root, triangle = (t.to(self.device, dtype) for t in (root, triangle.T))
                feat = self.inner.products(triangle[:channels], None if self.bias is None else triangle[-1])
                variance = torch.linalg.vector_norm(feat, dim=-1).square() / self.channels
            return Basis(centred(weight, 1) @ root, bias, feat, (variance + norm.eps).rsqrt(), False)

    def keys_values(self, to_kv: nn.Linear, norm: nn.LayerNorm) -> Tensor:
        basis = self.basis(to_kv, norm)
        scale: Any = basis.scale  # that basis has one
        with unless_autocast(self.device):
            kv = basis.feat @ basis.weight.T * scale.unsqueeze(-1) + basis.bias
        return kv.to(projected_dtype(to_kv.weight))

    def sources(self) -> tuple[Tensor, ...]:
        return (*self.inner.sources(), self.weight, *(() if self.bias is None else (self.bias,)))

    def materialize(self) -> Tensor:
        return nn.functional.linear(self.inner.materialize(), self.weight, self.bias)


def embedded_points(points: PointTokens, weight: Tensor, bias: Tensor | None) -> Tokens:
    """:class:`EmbeddedPoints`; or the result of the layer, where it has no more channels than what it is made of."""
    if weight.shape[0] > points.channels:
        return EmbeddedPoints(points, weight, bias)
    codes = points.codes()
    tokens = DenseTokens(nn.functional.linear(codes.to(projected_dtype(points.feat)), weight, bias))
    tokens.kind = "embedded points, built as they have no more channels than their codes,"
    return tokens


def variance_of_products(z: Tensor, weight: Tensor) -> Tensor:
    """``|weight z_m|^2 / D``: the variance of the D channels of a product whose weight is centred.

    Args:
        z: ``[B, M, C]``.
        weight: ``[D, C]``, its mean over D zero.

    Returns:
        ``[B, M]``.
    """
    if transformed():
        return _variance(z, weight)
    return _VarianceOfProducts.apply(z, weight)


def _variance(z: Tensor, weight: Tensor) -> Tensor:
    return (z @ weight.T).square().mean(-1)


class _VarianceOfProducts(torch.autograd.Function):
    """:func:`_variance` at C^2 multiply-adds a token where D is larger, and its gradient at as many."""

    @staticmethod
    def forward(ctx, z, weight):
        ctx.save_for_backward(z, weight)
        root = weight
        if weight.shape[0] > weight.shape[1]:  # |W z| = |R z| for W = Q R
            root = torch.linalg.qr(in_float64(weight), mode="r").R.to(weight)
        return torch.linalg.vector_norm(z @ root.T, dim=-1).square() / weight.shape[0]

    @staticmethod
    def backward(ctx, d_out):
        z, weight = ctx.saved_tensors

        def kernel():
            g = d_out.unsqueeze(-1) * (2 / weight.shape[0])
            wide = in_float64(weight)
            dz = g * (z @ (wide.T @ wide).to(z)) if ctx.needs_input_grad[0] else None
            dweight = weight @ (z.flatten(0, 1).T @ (g * z).flatten(0, 1)) if ctx.needs_input_grad[1] else None
            return dz, dweight

        if differentiated_again():
            return differentiable(kernel, _variance, (z, weight), (d_out,), ctx.needs_input_grad)
        return kernel()
