"""Tokens in several groups, attended to group by group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from perceiver_fast.tokens.base import Tokens

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard


class TokenGroups:
    """Groups of tokens with the same number of channels: modalities, shards of an input, chunks of a stream.

    A layer attends to each group on the way that suits the group, and merges the results by their log-sum-exps,
    ``o = sum_g w_g o_g`` with ``w_g = exp(lse_g - lse)``. That equals attention to the joined tokens, without joining.

    Args:
        groups: at least one description, all of the same ``channels``.
        masks: one bool ``[B, M_g]`` (or ``[B, *sizes]`` of a grid) or None for every group, True where a token may be
            attended to. Default: all.
        firsts: index of the first token of every group among all tokens. Default: one group follows the other.

    Raises:
        ValueError: no group, groups of different channels, or another number of masks.
    """

    shard: Shard | None = None  # see Tokens.shard

    def __init__(
        self,
        groups: Sequence[Tokens],
        masks: Sequence[Tensor | None] | None = None,
        firsts: Sequence[int] | None = None,
    ):
        self.groups = tuple(groups)
        counts = [group.count for group in self.groups]
        for group, first in zip(self.groups, [0, *accumulate(counts)] if firsts is None else firsts):
            group.first = first
        masks = (None,) * len(self.groups) if masks is None else tuple(masks)
        self.masks = tuple(None if mask is None else mask.flatten(1) for mask in masks)
        widths = sorted({group.channels for group in self.groups})
        if len(widths) != 1:
            raise ValueError(f"TokenGroups: expected groups of one number of channels, got {widths or 'no group'}")
        if len(self.masks) != len(self.groups):
            raise ValueError(
                f"TokenGroups: expected one mask or None for each of {len(self.groups)} groups, got {len(self.masks)}"
            )

    @property
    def channels(self) -> int:
        """Channels of a token, C."""
        return self.groups[0].channels

    @property
    def batch(self) -> int:
        """Number of batch elements, B."""
        return self.groups[0].batch

    @property
    def count(self) -> int:
        """Number of tokens of all groups, M."""
        return sum(group.count for group in self.groups)

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that the tokens are made of."""
        return tuple(source for group in self.groups for source in group.sources())

    def materialize(self) -> Tensor:
        """All tokens joined, ``[B, M, C]``."""
        return torch.cat([group.materialize() for group in self.groups], 1)

    def tensor(self) -> Tensor:
        """All tokens joined, from what the groups have built already: for modules that have to be called on tensors."""
        return torch.cat([group.tensor() for group in self.groups], 1)

    def mask(self) -> Tensor | None:
        """The masks joined, bool ``[B, M]``, or None where there is none."""
        if all(mask is None for mask in self.masks):
            return None
        parts = []
        for group, mask in zip(self.groups, self.masks):
            full = torch.ones(group.batch, group.count, dtype=torch.bool, device=group.device)
            parts.append(full if mask is None else mask)
        return torch.cat(parts, 1)
