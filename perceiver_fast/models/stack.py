"""Stacks of blocks: how they are built and share weights, how latents run through them, and the head after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from perceiver_fast.backends import forced_backend, use_backend
from perceiver_fast.layers import EnformerAttentionResidual, PerceiverBlock
from perceiver_fast.layers.fusing import is_plain, is_watched, watcher
from perceiver_fast.layers.residual_stream import fits, normalize
from perceiver_fast.layers.uses import several_uses
from perceiver_fast.ops.rounding import rounding_once
from perceiver_fast.ranges import layer_range

T = TypeVar("T")


def build_layers(build: Callable[[], T], depth: int, shared: int | None) -> list[T]:
    """A list of ``depth`` results of ``build``.

    Args:
        build: makes one layer.
        depth: the length of the list.
        shared: index of the layer that stands in all later places, too; None for layers of their own. With
            weight_tie_layers perceiver-pytorch shares all layers but the first (1), and all of PerceiverIO (0).
    """
    layers: list[T] = []
    for i in range(depth):
        layers.append(layers[shared] if shared is not None and i > shared else build())
    return layers


def are_shared(layers: nn.ModuleList) -> bool:
    """Whether one of the layers stands in several places."""
    return len({id(layer) for layer in layers}) < len(layers)


def build_blocks(
    depth: int, shared: int | None, attn_residual_rank: int | None = None, *, dim: int, **arguments: Any
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Blocks, and an attention residual for each.

    Args:
        depth, shared: see :func:`build_layers`; a shared block shares its attention residual.
        attn_residual_rank: rank of the attention residuals' logits. Default: None, there are none.
        dim, **arguments: of :class:`PerceiverBlock`.

    Returns:
        The blocks, and as many attention residuals, or Nones in their place.
    """

    def layer() -> tuple[PerceiverBlock, EnformerAttentionResidual | None]:
        block = PerceiverBlock(dim=dim, **arguments)
        return block, None if attn_residual_rank is None else EnformerAttentionResidual(dim, rank=attn_residual_rank)

    layers = build_layers(layer, depth, shared)
    residuals: list[Any] = [residual for _, residual in layers]  # torch takes None for a module, but does not say so
    return nn.ModuleList(block for block, _ in layers), nn.ModuleList(residuals)


def first_hiddens(x: Tensor, block_outputs: Sequence[Tensor] | Tensor | None, needed: bool) -> list[Tensor] | None:
    """The list that :func:`run_blocks` appends the outputs of blocks to.

    Args:
        x: latents ``[B, N, D]`` before the first block.
        block_outputs: outputs of earlier blocks, as the models take them.
        needed: whether the list is needed even without ``block_outputs``.

    Returns:
        A new list of ``block_outputs``, or ``[x]`` without these; None if it is not needed.
    """
    if not needed and block_outputs is None:
        return None
    if block_outputs is None:
        return [x]
    return [block_outputs] if torch.is_tensor(block_outputs) else list(block_outputs)


@contextmanager
def _forcing(backend: str) -> Iterator[None]:
    """Force a backend in a block. (:class:`use_backend` alone would force it as soon as the object is made.)"""
    with use_backend(backend):
        yield


def run_checkpointed(layer: Callable[..., T], checkpoint: bool, *args: Any, **keywords: Any) -> T:
    """``layer(*args, **keywords)``; with ``checkpoint`` the backward computes its activations again, rather than save them.

    That is torch.utils.checkpoint without reentry, so the second forward draws the same random numbers as the first. It
    also runs on the backend that was forced during the first.
    """
    if not checkpoint or not torch.is_grad_enabled():
        return layer(*args, **keywords)
    forced = forced_backend()
    if forced != "auto" and not torch.compiler.is_compiling():  # a backward may run in another thread, where none is
        keywords["context_fn"] = lambda: (nullcontext(), _forcing(forced))
    return torch_checkpoint(layer, *args, use_reentrant=False, **keywords)


def rows_for(block: nn.Module, x: Tensor) -> Tensor:
    """The latents to call a block with: one row ``[1, N, D]`` if the whole batch shares them, else ``x [B, N, D]``.

    A plain block that attends to a context returns ``[B, N, D]`` for either, and computes less for one row. Any other
    block gets what perceiver-pytorch would give it.
    """
    if x.stride(0) != 0 or not is_plain(block, PerceiverBlock) or not block.has_cross_attn or watcher() is not None:
        return x
    return x[:1]


def run_blocks(
    x: Tensor,
    blocks: nn.ModuleList,
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
        hiddens: the list that the outputs of blocks are appended to; None if nobody needs them.
        checkpoint: see :func:`run_checkpointed`. Default: False.

    Returns:
        ``[B, N, D]``.
    """
    shared = are_shared(blocks)
    adds_up = shared and not checkpoint and _is_one_stream(blocks, attn_residuals)
    with rounding_once(x.device, shared, blocks.parameters), several_uses(adds_up) as uses:
        for block, attn_residual, keywords in zip(uses.of(list(blocks)), attn_residuals, arguments):
            rows = rows_for(block, x) if hiddens is None else x
            x = run_checkpointed(block, checkpoint, rows, **keywords)
            if hiddens is not None:
                hiddens.append(x)
            if attn_residual is not None:
                x = attn_residual(hiddens)
    return x


def _is_one_stream(blocks: nn.ModuleList, attn_residuals: Iterable[nn.Module | None]) -> bool:
    """Whether every block's latents reach the next with their gradient: no hook, and no module of others', may detach them.

    A later place's backward then runs that of an earlier one in any case.
    """
    if isinstance(attn_residuals, nn.ModuleList) and any(residual is not None for residual in attn_residuals):
        return False
    return all(is_plain(block, PerceiverBlock) for block in blocks)


class MeanPool(nn.Module):
    """Mean over the latents, ``[B, N, D]`` to ``[B, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Head(nn.Sequential):
    """A Sequential that profilers show as one named range, see :class:`perceiver_fast.ranges`."""

    @layer_range
    def forward(self, x: Tensor) -> Tensor:
        watched = is_watched(x)
        for module in self:
            x = module(x) if watched or not fits(module, x) else normalize(module, x, x.dtype)
        return x


def classifier_head(latent_dim: int, num_classes: int) -> Head:
    """Latents ``[B, N, D]`` to logits ``[B, num_classes]``; parameter names are perceiver-pytorch's."""
    return Head(MeanPool(), nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))
