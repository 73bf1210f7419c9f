"""What layers tell whoever looks on while they run: explain, and attention_map.

A hook would change the way that layers take (fusing.py). So a layer says by itself what it begins with, whether it is
called as a module or a fused op stands in for it. Without an observer that costs a comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from perceiver_fast.layers.plan import Plan
from perceiver_fast.tokens import TokenGroups, Tokens


class Observer:
    """Base class: look on at the forward of this thread, in :func:`observing`; a subclass says what at.

    A subclass may put hooks of its own (bound methods) on modules: they change nothing, so layers stay fused. Other
    threads run into these hooks too, and have to pass by them: ``if observer() is self``.
    """

    only_looks = True
    needs_queries = (
        True  # False in subclasses that do without the tensor of a decoder's queries where these are described
    )

    def begins(self, layer: nn.Module, shape: torch.Size, residual: bool) -> None:
        """A pre-normalised layer begins, on latents of ``shape``; residual: its result is added to them."""

    def attends(
        self,
        layer: nn.Module,
        z: Tensor,
        tokens: Tokens | TokenGroups | None = None,
        mask: Tensor | None = None,
        inverted: bool = False,
        fused: bool = True,
    ) -> None:
        """Normalised ``z [B, N, D]`` (or ``[1, N, D]``) of an attention layer is about to attend.

        Args:
            layer: a PreNorm with a context, or an Attention among ``z``.
            z: what attends.
            tokens: a description of what is attended to, Tokens or TokenGroups. Default: ``z`` itself.
            mask: ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to. Default: all.
            inverted: softmax over ``z``, then normalised over the tokens.
            fused: a fused op stands in for the layer's; else they are about to be called.
        """

    def decodes(self, layer: nn.Module, shape: torch.Size, latents: Tensor, plan: Plan) -> None:
        """Described queries, a tensor of ``shape [B, Q, D]`` if it were built, are about to attend to latents.

        Only an observer that needs no tensor of them is told. The layer has begun, and takes the way of ``plan``.
        """

    def plans(
        self,
        layer: nn.Module,
        z: Tensor,
        tokens: Tokens,
        mask: Tensor | None,
        inverted: bool,
        grouped: bool,
        plan: Plan,
    ) -> None:
        """A fused cross-attention, which has said what it attends to, is about to take the way of ``plan``.

        It says so for each of several groups of tokens (grouped) in their order.
        """


_current: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observing(observer: Observer) -> Iterator[Observer]:
    """``observer`` is told what layers do inside, in this thread."""
    token = _current.set(observer)
    try:
        yield observer
    finally:
        _current.reset(token)


def observer() -> Observer | None:
    """Who looks on at this thread, if anybody; nobody does where a graph is traced."""
    return None if torch.compiler.is_compiling() else _current.get()
