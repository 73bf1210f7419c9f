"""Tokens that a user describes by their positions: at every point of a grid, or at points anywhere.

A tensor ``[B, M, C]`` of them is what their positions make of it. A description holds the positions, so attention costs
what these do, and parts of the tensor are built only where somebody needs them. One class serves a model as data, which
latents attend to, and as queries of its decoder, which attend to latents (ops/grid_query_attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perceiver_fast.float64 import float64_device
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.reference.fourier_projection import LAYOUTS
from perceiver_fast.tokens.base import Tokens
from perceiver_fast.tokens.embedded import EmbeddedGrid, embedded_points
from perceiver_fast.tokens.fourier import AxisCodes
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.points import PointTokens
from perceiver_fast.tracing import trainable


@dataclass(frozen=True, eq=False)
class Description:
    """A description of M tokens of D channels, ``[B, M, D]``; made by :func:`grid_tokens` or :func:`point_tokens`.

    Attributes:
        feat: channels of the tokens' own, ``[B, *sizes, F]`` or ``[B, M, F]``, B = 1 where the whole batch shares them.
        embed: a linear layer, from channels and codes to D; or None.
        order: where each channel, in the order that ``embed`` or a model expects, stands among feat and then, for every
            axis, sines, cosines and the position: int64 ``[C]``. None: that very order.
    """

    feat: Tensor | None
    embed: nn.Linear | None
    order: Tensor | None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the grid, or ``(M,)``."""
        raise NotImplementedError

    @property
    def batch(self) -> int:
        """Number of batch elements, B; 1 where all of them share the tokens."""
        return 1 if self.feat is None else self.feat.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens, M."""
        return math.prod(self.sizes)

    @property
    def channels(self) -> int:
        """Channels of a token, D."""
        return self.code_channels if self.embed is None else self.embed.out_features

    @property
    def code_channels(self) -> int:
        """Channels of a token before ``embed``, C."""
        raise NotImplementedError

    @property
    def bare(self) -> bool:
        """Whether a token is its channels and positions as they are, without sines or an embedding.

        Such a token can be constant, and LayerNorm has to make exact zeros of it: the tensor is needed for that.
        """
        raise NotImplementedError

    def part(self, start: int, stop: int) -> Description:
        """The tokens of indices start to stop of the first axis."""
        raise NotImplementedError

    def parts(self, most: int) -> Iterator[Description]:
        """All tokens, in parts of at most so many where a part of one index of the first axis is not more already."""
        step = max(1, most // max(1, self.count // self.sizes[0]))
        for start in range(0, self.sizes[0], step):
            yield self.part(start, min(start + step, self.sizes[0]))

    def expand(self, batch: int) -> Description:
        """The same for every element of a batch of another size."""
        feat = self.feat
        if feat is None:
            feat = torch.empty(1, *self.sizes, 0)
        return replace(self, feat=feat.expand(batch, *feat.shape[1:]))

    def describe(self, like: Tensor) -> Tokens:
        """The description that layers work with, in the dtype and on the device of ``like``."""
        tokens = self._codes(like)
        order = None if self.order is None else self.order.to(like.device)
        if self.embed is None:
            tokens.order = order
            return tokens
        weight, bias = self.embed.weight, self.embed.bias
        if order is not None:
            weight = torch.zeros_like(weight).index_copy(1, order, weight)
        if isinstance(tokens, GridTokens):
            return EmbeddedGrid(tokens, weight, bias)
        return embedded_points(tokens, weight, bias)

    def _codes(self, like: Tensor) -> GridTokens | PointTokens:
        raise NotImplementedError

    def tensor(self, like: Tensor) -> Tensor:
        """The tokens themselves, ``[B or 1, M, D]``, in the dtype and on the device of ``like``."""
        tokens = self._codes(like)
        tokens.order = None if self.order is None else self.order.to(like.device)
        built = tokens.materialize()
        return built if self.embed is None else self.embed(built)


@dataclass(frozen=True, eq=False)
class GridDescription(Description):
    """Tokens at every point of a grid, in row-major order; see :func:`grid_tokens`.

    Attributes:
        codes: float64 ``[n_a, C_a]`` of every axis.
        first_axis: ends and frequencies of the first axis; None of a part, whose rows keep their places.
    """

    codes: tuple[Tensor, ...]
    first_axis: tuple[float, float, Tensor] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(code) for code in self.codes)

    @property
    def code_channels(self) -> int:
        return (0 if self.feat is None else self.feat.shape[-1]) + sum(code.shape[1] for code in self.codes)

    @property
    def bare(self) -> bool:
        return self.embed is None and all(code.shape[1] == 1 for code in self.codes)

    def part(self, start: int, stop: int) -> GridDescription:
        feat = None if self.feat is None else self.feat[:, start:stop]
        return replace(self, codes=(self.codes[0][start:stop], *self.codes[1:]), feat=feat, first_axis=None)

    def placed(self, start: int, total: int) -> GridDescription:
        """These rows as those from ``start`` on of a grid of ``total`` rows; a :meth:`part` has its place already."""
        if self.first_axis is None:
            return self
        rows = _axis_code(*self.first_axis, total)[start : start + self.sizes[0]]
        return replace(self, codes=(rows, *self.codes[1:]), first_axis=None)

    def _codes(self, like: Tensor) -> GridTokens:
        dtype, device = compute_dtype(like.dtype), like.device
        codes = []
        for code in self.codes:
            mean = code.mean(1)
            square = (code - mean.unsqueeze(1)).square().sum(1)
            codes.append(AxisCodes(*(t.to(device, dtype) for t in (code, mean, square))))
        feat = self.feat
        if feat is None:
            feat = torch.empty(1, *self.sizes, 0)
        return GridTokens(trainable(feat).to(device, like.dtype), tuple(codes))


@dataclass(frozen=True, eq=False)
class PointDescription(Description):
    """Tokens at points anywhere; see :func:`point_tokens`.

    Attributes:
        coords: positions ``[B, M, A]``, B = 1 where the whole batch shares them.
        frequencies: float64 ``[A, K]``, in half periods a unit of position.
    """

    coords: Tensor
    frequencies: Tensor

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.coords.shape[1],)

    @property
    def batch(self) -> int:
        feat = self.feat
        return self.coords.shape[0] if feat is None or feat.shape[0] == 1 else feat.shape[0]

    @property
    def code_channels(self) -> int:
        axes, bands = self.frequencies.shape
        return (0 if self.feat is None else self.feat.shape[-1]) + axes * (2 * bands + 1)

    @property
    def bare(self) -> bool:
        return self.embed is None and self.frequencies.shape[1] == 0

    def part(self, start: int, stop: int) -> PointDescription:
        feat = None if self.feat is None else self.feat[:, start:stop]
        return replace(self, coords=self.coords[:, start:stop], feat=feat)

    def _codes(self, like: Tensor) -> PointTokens:
        feat = self.feat
        if feat is None:
            feat = self.coords.new_empty(*self.coords.shape[:2], 0)
        where = float64_device(like.device)
        coords, frequencies = (t.to(where).double() for t in (trainable(self.coords), self.frequencies))
        feat = trainable(feat).expand(self.batch, -1, -1)
        return PointTokens(feat.to(like.device, like.dtype), coords, frequencies)


def grid_tokens(
    sizes: Sequence[int],
    *,
    num_freq_bands: int | None = None,
    max_freq: float | None = None,
    frequencies: Tensor | None = None,
    extent: float | Sequence[tuple[float, float]] = 1.0,
    feat: Tensor | None = None,
    embed: nn.Linear | None = None,
    layout: str = "perceiver-pytorch",
) -> GridDescription:
    """Tokens at every point of a grid, described: what a :class:`PerceiverIO` takes as data and as queries.

    A token is ``[feat ; Fourier code of its position]``, or ``embed`` of that. Along an axis the code has K sines, K
    cosines and the position itself, ``sin(pi f_k p)``, as in perceiver-pytorch. ``grid_queries`` is another name of this
    function, for decoders.

    Args:
        sizes: of the grid, one number an axis; tokens are in row-major order.
        num_freq_bands, max_freq: K frequencies evenly spaced in [1, max_freq / 2].
        frequencies: ``[K]``, in half periods a unit of position, in the place of these two; for 3DShape2VecSet's
            embedding of points ``2.0 ** torch.arange(8)``.
        extent: positions are evenly spaced in [-extent, extent] along every axis, or (a pair for every axis) between two
            numbers, ends included. Default: 1.
        feat: channels of the tokens' own, ``[B, *sizes, F]`` or ``[*sizes, F]``. Default: none.
        embed: ``nn.Linear(F + A (2 K + 1), D)``, which the tokens go through; it is trained with what uses them. Default:
            none, D is what it would take.
        layout: order of the channels after feat. ``"perceiver-pytorch"`` (default): for every axis sines, cosines,
            position. ``"deepmind"``: positions, sines, cosines. ``"vecset"`` (3DShape2VecSet's): sines, cosines,
            positions.

    Returns:
        A description of ``[B, prod(sizes), D]``; its ``tensor(like)`` builds that, in the dtype and on the device of
        ``like``.

    Raises:
        TypeError, ValueError: a wrong type, size or channels; the message says expected, got and what to do.

    Source:
        Jaegle et al., "Perceiver IO", ICLR 2022, sec. 3.2; Zhang et al., "3DShape2VecSet", SIGGRAPH 2023.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> queries = pf.grid_tokens((4, 5), num_freq_bands=3, max_freq=8.0)
        >>> queries.count, queries.channels
        (20, 14)
        >>> model = pf.PerceiverIO(depth=1, dim=9, queries_dim=14, logits_dim=2, num_latents=8, latent_dim=16)
        >>> model(torch.randn(1, 30, 9), queries=queries).shape
        torch.Size([1, 20, 2])
    """
    sizes = _check_sizes(sizes)
    axes = len(sizes)
    frequency = _frequencies("grid_tokens", num_freq_bands, max_freq, frequencies)
    codes = []
    ends = _check_extent(extent, axes)
    for (low, high), size in zip(ends, sizes):
        codes.append(_axis_code(low, high, frequency, size))
    if feat is not None:
        feat = _check_feat("grid_tokens", feat, sizes)
    order = _order(layout, axes, len(frequency), feat)
    made = GridDescription(feat, embed, order, tuple(codes), (*ends[0], frequency))
    _check_embed("grid_tokens", made)
    return made


def point_tokens(
    coords: Tensor,
    *,
    num_freq_bands: int | None = None,
    max_freq: float | None = None,
    frequencies: Tensor | None = None,
    feat: Tensor | None = None,
    embed: nn.Linear | None = None,
    layout: str = "perceiver-pytorch",
) -> PointDescription:
    """Tokens at given positions, described: what a :class:`PerceiverIO` takes as data and as queries.

    A token is as in :func:`grid_tokens`; ``point_queries`` is another name of this function, for decoders.

    Args:
        coords: positions ``[B, M, A]``, or ``[M, A]`` where the whole batch shares them; floating point.
        feat: channels of the tokens' own, ``[B, M, F]`` or ``[M, F]``. Default: none.
        num_freq_bands, max_freq, frequencies, embed, layout: see :func:`grid_tokens`.

    Returns:
        A description of ``[B, M, D]``; its ``tensor(like)`` builds that.

    Raises:
        TypeError, ValueError: a wrong type, size or channels; the message says expected, got and what to do.

    Source:
        See :func:`grid_tokens`.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> embed = torch.nn.Linear(51, 512)
        >>> points = pf.point_tokens(torch.rand(1000, 3), frequencies=2.0 ** torch.arange(8), embed=embed, layout="vecset")
        >>> points.count, points.channels
        (1000, 512)
        >>> model = pf.PerceiverIO(depth=1, dim=512, queries_dim=512, num_latents=8, latent_dim=16)
        >>> model(points).shape  # K and V of 51 channels, not of 512
        torch.Size([1, 8, 16])
    """
    who = "point_tokens"
    if not isinstance(coords, Tensor) or not coords.is_floating_point():
        got = coords.dtype if isinstance(coords, Tensor) else type(coords).__name__
        raise TypeError(
            f"{who}: expected coords as a tensor of floating point, got {got}; use torch.tensor(..).double()"
        )
    if coords.dim() not in (2, 3) or 0 in (coords.shape[0] if coords.dim() == 3 else 1, coords.shape[-1]):
        raise ValueError(f"{who}: expected coords [M, A] or [B, M, A] of at least one axis, got {tuple(coords.shape)}")
    coords = coords if coords.dim() == 3 else coords.unsqueeze(0)
    axes = coords.shape[-1]
    frequency = _frequencies(who, num_freq_bands, max_freq, frequencies)
    if feat is not None:
        feat = _check_feat(who, feat, coords.shape[1:2])
    order = _order(layout, axes, len(frequency), feat)
    made = PointDescription(feat, embed, order, coords, frequency.expand(axes, -1).contiguous())
    _check_embed(who, made)
    return made


def _axis_code(low: float, high: float, frequency: Tensor, size: int) -> Tensor:
    """The codes of an axis of ``size`` positions from ``low`` to ``high``, float64 ``[size, 2 K + 1]``."""
    position = torch.linspace(low, high, size, dtype=torch.float64, device="cpu").unsqueeze(1)
    angle = position * frequency
    angle = math.pi * (angle - 2 * (angle / 2).round())
    return torch.cat([angle.sin(), angle.cos(), position], 1)


def _check_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"grid_tokens: expected sizes of at least one axis, each at least 1, got {sizes}")
    return sizes


def _check_extent(extent: float | Sequence[tuple[float, float]], axes: int) -> list[tuple[float, float]]:
    if isinstance(extent, (int, float)):
        return [(-float(extent), float(extent))] * axes
    pairs = [tuple(map(float, pair)) for pair in extent]
    if len(pairs) != axes or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"grid_tokens: expected one number, or (from, to) for each of {axes} axes, got {extent}")
    return [(low, high) for low, high in pairs]


def _frequencies(who: str, bands: int | None, max_freq: float | None, frequencies: Tensor | None) -> Tensor:
    """The frequencies ``[K]`` in float64, on the CPU, as some devices have no float64."""
    if (frequencies is None) == (bands is None or max_freq is None) or (frequencies is not None and bands is not None):
        raise ValueError(
            f"{who}: expected num_freq_bands and max_freq, or frequencies, got num_freq_bands={bands}, "
            f"max_freq={max_freq}, frequencies={'none' if frequencies is None else 'some'}; give one of the two"
        )
    if bands is not None and max_freq is not None:
        return torch.linspace(1.0, max_freq / 2, bands, dtype=torch.float64, device="cpu")
    frequencies = torch.as_tensor(frequencies)
    if frequencies.dim() != 1:
        raise ValueError(f"{who}: expected frequencies [K], got {tuple(frequencies.shape)}; all axes share them")
    return frequencies.detach().to("cpu", torch.float64)


def _check_feat(who: str, feat: Tensor, sizes: Sequence[int]) -> Tensor:
    """``feat`` with a dimension for the batch."""
    sizes, dims = tuple(sizes), len(sizes)
    if not isinstance(feat, Tensor) or not feat.is_floating_point():
        got = feat.dtype if isinstance(feat, Tensor) else type(feat).__name__
        raise TypeError(f"{who}: expected feat as a tensor of floating point, got {got}")
    if feat.dim() not in (dims + 1, dims + 2) or tuple(feat.shape[-1 - dims : -1]) != sizes:
        layout = ", ".join(map(str, sizes))
        raise ValueError(f"{who}: expected feat [{layout}, F] or [B, {layout}, F], got {tuple(feat.shape)}")
    return feat if feat.dim() == dims + 2 else feat.unsqueeze(0)


def _check_embed(who: str, made: Description) -> None:
    embed = made.embed
    if embed is None:
        return
    if not isinstance(embed, nn.Linear):
        raise TypeError(f"{who}: expected embed to be an nn.Linear, got {type(embed).__name__}")
    if embed.in_features != made.code_channels:
        raise ValueError(
            f"{who}: expected embed to take {made.code_channels} channels, those of feat and of the codes, "
            f"got nn.Linear({embed.in_features}, {embed.out_features}); change it or the number of frequencies"
        )


def _order(layout: str, axes: int, bands: int, feat: Tensor | None) -> Tensor | None:
    """:attr:`Description.order` of a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "perceiver-pytorch":
        return None
    features = 0 if feat is None else feat.shape[-1]
    place = features + torch.arange(axes * (2 * bands + 1), device="cpu").view(axes, 2 * bands + 1)
    sines, cosines, positions = (t.flatten() for t in place.split([bands, bands, 1], 1))
    codes = {"deepmind": (positions, sines, cosines), "vecset": (sines, cosines, positions)}[layout]
    return torch.cat([torch.arange(features, device="cpu"), *codes])
