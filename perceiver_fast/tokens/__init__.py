"""Tokens are described, never built: what a model's cross-attention layers share of one input."""

from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tokens.embedded import EmbeddedGrid, EmbeddedPoints
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.groups import TokenGroups, merge_groups
from perceiver_fast.tokens.points import PointTokens
from perceiver_fast.tokens.queries import GridQueries, PointQueries, Queries, grid_queries, point_queries

__all__ = [
    "Basis",
    "DenseTokens",
    "EmbeddedGrid",
    "EmbeddedPoints",
    "GridQueries",
    "GridTokens",
    "PointQueries",
    "PointTokens",
    "Queries",
    "TokenGroups",
    "Tokens",
    "absorb_norm",
    "grid_queries",
    "merge_groups",
    "point_queries",
]
