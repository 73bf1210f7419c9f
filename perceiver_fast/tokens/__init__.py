"""Tokens are described, never built: what a model's cross-attention layers share of one input."""

from perceiver_fast.tokens.base import Basis, Tokens, absorb_norm
from perceiver_fast.tokens.dense import DenseTokens
from perceiver_fast.tokens.description import (
    Description,
    GridDescription,
    PointDescription,
    grid_tokens,
    point_tokens,
)
from perceiver_fast.tokens.embedded import EmbeddedGrid, EmbeddedPoints
from perceiver_fast.tokens.grid import GridTokens
from perceiver_fast.tokens.groups import TokenGroups
from perceiver_fast.tokens.merging import merge_parts
from perceiver_fast.tokens.points import PointTokens
from perceiver_fast.tokens.streams import Stream, TokenStream, is_read, stream

grid_queries = grid_tokens
"""``grid_tokens`` under the name of what it describes in a decoder."""

point_queries = point_tokens
"""``point_tokens`` under the name of what it describes in a decoder."""

__all__ = [
    "Basis",
    "DenseTokens",
    "Description",
    "EmbeddedGrid",
    "EmbeddedPoints",
    "GridDescription",
    "GridTokens",
    "PointDescription",
    "PointTokens",
    "Stream",
    "TokenGroups",
    "TokenStream",
    "Tokens",
    "absorb_norm",
    "grid_queries",
    "grid_tokens",
    "is_read",
    "merge_parts",
    "point_queries",
    "point_tokens",
    "stream",
]
