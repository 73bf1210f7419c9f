"""Tokens are described, never built: what a model's cross-attention layers share of one input."""

from perceiver_fast.tokens.base import Tokens, absorb_norm
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.groups import TokenGroups, merge_groups
from perceiver_fast.tokens.points import PointTokens

__all__ = ["DenseTokens", "GridTokens", "PointTokens", "TokenGroups", "Tokens", "absorb_norm", "merge_groups"]
