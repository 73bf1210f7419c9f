"""The layers of ``perceiver_pytorch.perceiver_io``: they have the names of the Perceiver's, but no dropout."""

from __future__ import annotations

from perceiver_fast.layers import attention, feed_forward
from perceiver_fast.layers.fusing import fusable


@fusable
class Attention(attention.Attention):
    """Attention without dropout of its weights.

    Args:
        query_dim, context_dim, heads, dim_head: see :class:`perceiver_fast.layers.Attention`.
    """

    drops = False

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64):
        super().__init__(query_dim, context_dim, heads, dim_head)
        del self.dropout


@fusable
class FeedForward(feed_forward.FeedForward):
    """GEGLU feed-forward without dropout.

    Args:
        dim, mult: see :class:`perceiver_fast.layers.FeedForward`.
    """

    def __init__(self, dim: int, mult: int = 4):
        super().__init__(dim, mult)
        del self.net[3]
