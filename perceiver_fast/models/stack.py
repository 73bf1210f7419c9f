"""Stacks of layers: which share their weights, how their outputs are kept and combined, and the head after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from perceiver_fast.backends import forced_backend, use_backend
from perceiver_fast.layers import PerceiverBlock
from perceiver_fast.layers.fusing import is_plain, watcher
from perceiver_fast.ranges import layer_range

T = TypeVar("T")


def build_layers(build: Callable[[], T], depth: int, shared: int | None) -> list[T]:
    """``depth`` times ``build()``; from index ``shared`` on, if given, all are that one.

    perceiver-pytorch's weight_tie_layers leaves the first layer of most models on its own (``shared=1``), and shares
    every layer of PerceiverIO (``shared=0``).
    """
    layers: list[T] = []
    for i in range(depth):
        layers.append(layers[shared] if shared is not None and i > shared else build())
    return layers


def first_hiddens(x: Tensor, block_outputs: Sequence[Tensor] | Tensor | None, keep: bool) -> list[Tensor] | None:
    """The list that :func:`run_blocks` appends to: a copy of ``block_outputs``, or ``[x]``; None unless kept."""
    if not keep and block_outputs is None:
        return None
    if block_outputs is None:
        return [x]
    return [block_outputs] if torch.is_tensor(block_outputs) else list(block_outputs)


@contextmanager
def _forcing(backend: str) -> Iterator[None]:
    """Force a backend inside; not from its making on, as :class:`use_backend` does."""
    with use_backend(backend):
        yield


def run_checkpointed(layer: Callable[..., T], checkpoint: bool, *args, **keywords) -> T:
    """``layer(*args, **keywords)``; with ``checkpoint`` its activations are computed again in the backward, not kept.

    Random numbers are drawn the same the second time, as in torch.utils.checkpoint without reentry, which it is.
    """
    if not checkpoint or not torch.is_grad_enabled():
        return layer(*args, **keywords)
    forced = forced_backend()
    if forced != "auto" and not torch.compiler.is_compiling():  # backwards may run in another thread
        keywords["context_fn"] = lambda: (nullcontext(), _forcing(forced))
    return torch_checkpoint(layer, *args, use_reentrant=False, **keywords)


def rows_for(block: nn.Module, x: Tensor) -> Tensor:
    """What to call a block with: ``[1, N, D]`` of latents that the whole batch shares, where nobody can see that; else x.

    Args:
        block: a block; one that is plain and attends to a context makes ``[B, N, D]`` of either.
        x: latents ``[B, N, D]`` that nobody else has.
    """
    if x.stride(0) != 0 or not is_plain(block, PerceiverBlock) or not block.has_cross_attn or watcher() is not None:
        return x
    return x[:1]


def run_blocks(
    x: Tensor,
    blocks: Iterable[nn.Module],
    attn_residuals: Iterable[nn.Module | None],
    hiddens: list[Tensor] | None,
    arguments: Iterable[dict],
    checkpoint: bool = False,
) -> Tensor:
    """``x`` through all blocks, each followed by its attention residual if it has one.

    Args:
        x: latents ``[B, N, D]``.
        blocks: called with the latents and ``arguments``, one dict a block.
        attn_residuals: one a block; called with ``hiddens``.
        hiddens: the blocks' outputs are appended to it; None if nobody asks for them.
        checkpoint: compute what is inside a block again in the backward, rather than keep it. Default: False.

    Returns:
        ``[B, N, D]``.
    """
    for block, attn_residual, keywords in zip(blocks, attn_residuals, arguments):
        rows = rows_for(block, x) if hiddens is None else x
        x = run_checkpointed(block, checkpoint, rows, **keywords)
        if hiddens is not None:
            hiddens.append(x)
        if attn_residual is not None:
            x = attn_residual(hiddens)
    return x


class MeanPool(nn.Module):
    """Mean over the latents, ``[B, N, D]`` to ``[B, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Head(nn.Sequential):
    """A Sequential that has a range of its own, see :class:`perceiver_fast.ranges`."""

    @layer_range
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def classifier_head(latent_dim: int, num_classes: int) -> Head:
    """Latents ``[B, N, D]`` to logits ``[B, num_classes]``; parameter names are perceiver-pytorch's."""
    return Head(MeanPool(), nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))
