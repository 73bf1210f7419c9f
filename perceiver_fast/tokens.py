"""Tokens are described, never built: what a model's cross-attention layers share of one input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast import ops
from perceiver_fast.ops.library import compute_dtype


class Tokens:
    """What every description of tokens offers."""

    def __init__(self):
        self._normalized: dict[float, Tensor] = {}

    def materialize(self) -> Tensor:
        """The ``[B, M, C]`` tensor this object stands for. Only paths without a kernel, and tests, call it."""
        raise NotImplementedError

    def normalized(self, eps: float) -> Tensor:
        """The built tokens after LayerNorm without its affine part, ``[B, M, C]``; computed once for all layers."""
        if eps not in self._normalized:
            tokens = self.materialize()
            self._normalized[eps] = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
        return self._normalized[eps]


class GridTokens(Tokens):
    """Tokens ``[x_m ; e_1(i_1) ; .. ; e_A(i_A)]``: raw channels on a grid, and one code per axis and index.

    Built once a forward and shared by every cross-attention layer; LayerNorm's scale is computed once for each eps.

    Args:
        feat: raw channels ``[B, *sizes, F]``, floating point.
        codes: one :class:`perceiver_fast.layers.fourier.AxisCodes` per axis, in float32 or float64.
    """

    def __init__(self, feat: Tensor, codes: tuple):
        super().__init__()
        self.dtype = feat.dtype
        self.feat = feat.to(compute_dtype(feat.dtype))
        self.codes = codes
        self._scale: dict[float, Tensor] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The grid's sizes, n_1 .. n_A."""
        return tuple(self.feat.shape[1:-1])

    @property
    def features(self) -> int:
        """Raw channels a token, F."""
        return self.feat.shape[-1]

    @property
    def channels(self) -> int:
        """Channels of a token as perceiver-pytorch would build it, C."""
        return self.features + sum(code.code.shape[-1] for code in self.codes)

    def scale(self, eps: float) -> Tensor:
        """LayerNorm's ``1 / sqrt(var + eps)`` of every token, ``[B, *sizes]``."""
        if eps not in self._scale:
            mean = torch.cat([code.mean for code in self.codes])
            square = torch.cat([code.square for code in self.codes])
            self._scale[eps] = ops.grid_scale(self.feat, mean, square, self.codes[0].code.shape[-1], eps)
        return self._scale[eps]

    def project(self, weight: Tensor) -> Tensor:
        """Product of a weight on token channels with the basis ``[x, onehot, .., onehot]``.

        Args:
            weight: ``[D, C]``.

        Returns:
            ``[D, L]``, L = F + sum(sizes): the raw channels' columns, then one column per index of every axis.
        """
        feat, *axes = weight.split([self.features, *(code.code.shape[-1] for code in self.codes)], dim=1)
        return torch.cat([feat, *(axis @ code.code.T for axis, code in zip(axes, self.codes))], dim=1)

    def materialize(self) -> Tensor:
        batch, sizes = self.feat.shape[0], self.sizes
        parts = [self.feat]
        for axis, code in enumerate(self.codes):
            shape = [1] * (len(sizes) + 1) + [code.code.shape[-1]]
            shape[1 + axis] = sizes[axis]
            parts.append(code.code.view(shape).expand(batch, *sizes, -1))
        return torch.cat(parts, -1).flatten(1, -2).to(self.dtype)


class DenseTokens(Tokens):
    """Tokens that exist as a tensor: input that comes with its own encoding.

    Args:
        context: ``[B, M, C]``.
    """

    def __init__(self, context: Tensor):
        super().__init__()
        self.context = context

    def materialize(self) -> Tensor:
        return self.context
