"""What the kernels of grid_query_attention read: keys' tables, biases and values, padded; and which variant they take.

Tables are transposed, so that an index of an axis is a row of all keys. Keys are padded to whole tiles, and the padding,
like masked keys, has a bias of -inf and zeros elsewhere: no tile needs a bound, and nothing that is masked is looked at.
A grid has at most three axes here; others are joined, and what a joined axis collects belongs to each of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from perceiver_fast.kernels.configs import Config, config
from perceiver_fast.kernels.dense_tiles import Pieces, cut

MOST_AXES = 3  # that a query's index is taken apart into
PAD = 64  # keys of the largest tile
FEW_FEATURES = 8  # up to so many raw channels are multiplied one by one, not as a product of matrices
FEW_CHANNELS = 4  # likewise, of values
FORWARD, DOUBLED, BACKWARD = 256, 64, 128  # channels a program sums: with heads added up there are two such sums
SHORT, JOINED = 32, 4096  # a last axis below the first number is joined with the one before, up to the second


def join(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The axes of a grid by groups that are joined: at most three, and as few joined entries as possible.

    Example:
        >>> join((128, 128, 128)), join((2, 3, 4, 5)), join((500, 3))
        ([(128,), (128,), (128,)], [(2, 3), (4,), (5,)], [(500, 3)])
    """
    groups = [(size,) for size in sizes]

    def merge(at: int) -> None:
        groups[at : at + 2] = [groups[at] + groups[at + 1]]

    while len(groups) > MOST_AXES:
        merge(min(range(len(groups) - 1), key=lambda i: math.prod(groups[i]) * math.prod(groups[i + 1])))
    while len(groups) > 1 and math.prod(groups[-1]) < SHORT and math.prod(groups[-2] + groups[-1]) <= JOINED:
        merge(len(groups) - 2)
    return groups


@dataclass(frozen=True)
class Keys:
    """All keys of all heads, padded.

    Args:
        tables: ``[B, H, F + sum of joined axes, padded]`` float32.
        bias: ``[B, H, padded]`` float32, -inf for what is masked or padding.
        v: ``[B, H, padded, C rounded up to 16]``, or ``[B, H, C, padded]`` with few channels.
        blank: uint8 ``[B]``, 1 where all keys are masked: those attend uniformly. None without a mask.
        groups: see :func:`join`; empty for points.
    """

    tables: Tensor
    bias: Tensor
    v: Tensor
    blank: Tensor | None
    groups: list[tuple[int, ...]]

    @property
    def sizes(self) -> list[int]:
        """Of the joined axes."""
        return [math.prod(group) for group in self.groups]


def describe_keys(
    tables: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, sizes: tuple[int, ...], features: int
) -> Keys:
    """Pad, mask and transpose; everything is computed on the device, without waiting for it.

    ``sizes`` are those of the grid, and empty for points; other arguments are the operator's.
    """
    batch, heads, keys, channels = v.shape
    padded = triton.cdiv(keys, PAD) * PAD
    groups = join(sizes)
    parts, at = [tables[..., :features]], features
    for group in groups:
        joined = tables.new_zeros(1)
        for size in group:
            joined = (joined.unsqueeze(-1) + tables[..., at : at + size].unsqueeze(-2)).flatten(-2)
            at += size
        parts.append(joined)
    length = features + sum(math.prod(group) for group in groups)
    t = tables.new_zeros(batch, heads, length, padded)
    b = tables.new_full((batch, heads, padded), -math.inf)
    few = channels <= FEW_CHANNELS
    shape = (channels, padded) if few else (padded, channels + -channels % 16)
    values = v.new_zeros(batch, heads, *shape)
    whole = values.mT if few else values  # [B, H, padded, C ..]
    start = 0
    for part in parts:
        t[:, :, start : start + part.shape[-1], :keys].copy_(part.mT)
        start += part.shape[-1]
    b[..., :keys] = 0.0 if bias is None else bias
    whole[:, :, :keys, :channels].copy_(v)
    blank = None
    if mask is not None:
        empty = ~mask.any(1)
        hidden = ~mask[:, None, :]
        t[..., :keys].masked_fill_(hidden[:, :, None, :], 0.0)
        b[..., :keys].masked_fill_(hidden, -math.inf)
        b[..., :keys].masked_fill_(empty[:, None, None], 0.0)
        whole[:, :, :keys].masked_fill_((hidden & ~empty[:, None, None])[..., None], 0.0)
        blank = empty.to(torch.uint8)
    return Keys(t, b, values, blank, groups)


@dataclass(frozen=True)
class Variant:
    """Which variant of the kernels a call takes, and how its channels are cut.

    Args:
        dtype: of raw channels and values.
        features, channels: F and C.
        arch: the architecture that it is for.
    """

    dtype: torch.dtype
    features: int
    channels: int
    arch: int

    @property
    def few_features(self) -> bool:
        alone = (
            not self.half or self.few_channels or self.features == 0
        )  # beside products on tensor cores one more is cheap
        return alone and self.features <= FEW_FEATURES

    @property
    def few_channels(self) -> bool:
        return self.channels <= FEW_CHANNELS

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def precision(self) -> str:
        """Of products of matrices, if there are any: on tensor cores, or in float32."""
        return "bf16" if self.half and not (self.few_features and self.few_channels) else "ieee"

    def config(self, kernel: str) -> Config:
        """A kernel's configuration: of what has no products of matrices, of float32 or of half precision."""
        kind = "fp32"
        if self.few_features and self.few_channels:
            kind = "few"
        elif self.half:
            kind = "half" if max(self.features, self.channels) <= 64 else "half, wide"
        return config(f"grid_query_attention_{kernel}[{kind}]", self.arch)

    def read(self, channels: int) -> Pieces:
        """How channels that a product sums over are cut."""
        return cut(channels, 64 if channels <= 128 and self.half else 32)

    def summed(self, channels: int, most: int) -> Pieces:
        """How channels of what is summed are cut: groups of at most ``most`` in half precision, half as many in float32."""
        return cut(channels, 64, most) if self.half else cut(channels, 32, most // 2)

    @property
    def backward(self) -> int:
        """Channels that a program of the backward sums at most: fewer where products are a warp's, and not sm_90's."""
        return BACKWARD if 90 <= self.arch < 100 else BACKWARD // 2

    def holds(self, channels: int) -> bool:
        """Whether a tile of so many channels stays in registers."""
        return channels <= (128 if self.half else 64)
