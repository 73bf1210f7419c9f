"""Checks of what models are called with. Every model has a method ``check_inputs``, which makes the checks it needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.layers import PreNorm
from perceiver_fast.layers.checks import check_channels, check_device, check_real, check_tensor
from perceiver_fast.tracing import intercepted


def like(model: nn.Module) -> Tensor:
    """A parameter of ``model``: inputs have to have its dtype and device.

    It is the latents, if they can be read without computing them. A parametrization computes them at every access, and
    may count accesses, as spectral norm does.
    """
    latents = model._parameters.get("latents")
    if latents is None:
        latents = model.__dict__.get("latents")  # a plain attribute in replicas of nn.DataParallel, and when pruned
    return next(model.parameters()) if latents is None else latents


def context_channels(model: nn.Module) -> int | None:
    """Channels of the tokens that the first cross-attention of ``model`` takes; None if its norm does not say."""
    for module in model.modules():
        if isinstance(module, PreNorm) and module.norm_context is not None:
            return norm_channels(module.norm_context)
    return None


def norm_channels(norm: nn.Module | None) -> int | None:
    """Channels that a norm takes, the last number of ``normalized_shape``; None if it has no such attribute."""
    shape = getattr(norm, "normalized_shape", None)
    return shape[-1] if shape else None


def check_width(built: int, given: int, now: int | None) -> int:
    """The number of channels to expect of an input; layers may have been replaced since the model was built.

    Args:
        built: what the model was built for.
        given: what the input has.
        now: what the layers take now; None if they do not say, and then what is given is taken.
    """
    if given == built:
        return built
    return given if now is None else now


def check_coords(who: str, what: str, coords: Tensor, data: Tensor, axes: int) -> None:
    """Check the positions ``[B, M, A]`` or ``[M, A]`` of ``data [B, M, F]``, A = ``axes``.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    check_tensor(who, what, coords)
    if not coords.is_floating_point():
        raise TypeError(f"{who}: expected floating-point {what}, got {coords.dtype}; convert, e.g. {what}.double()")
    batch, tokens = data.shape[:2]

    def layout() -> str:  # called only for an error: putting the batch size into words ties a traced graph to it
        return f"[{tokens}, {axes}] or [{batch}, {tokens}, {axes}]"

    if coords.dim() not in (2, 3) or coords.shape[-1] != axes:
        raise ValueError(
            f"{who}: expected {what} {layout()}, {axes} a token (input_axis={axes}), got {tuple(coords.shape)}; "
            "put a token's coordinates last, or build the model with another input_axis"
        )
    if coords.shape[-2] != tokens or (coords.dim() == 3 and coords.shape[0] != 1 and coords.shape[0] != batch):
        raise ValueError(
            f"{who}: expected {what} {layout()}, a position for every token of data {tuple(data.shape)}, "
            f"got {tuple(coords.shape)}; pad both alike and mask the padding, or leave out the batch if it is shared"
        )
    check_device(who, what, coords, data)


def check_queries(who: str, queries: Tensor, batch: int, channels: int, like: Tensor) -> Tensor:
    """Check decoder queries.

    Args:
        who: the model's name, for messages.
        queries: ``[B, Q, D]``, or ``[Q, D]`` when the whole batch shares them.
        batch, channels: the expected B and D.
        like: a parameter of the model, whose dtype and device are expected.

    Returns:
        The queries ``[B, Q, D]``, or ``[1, Q, D]`` where the whole batch shares them.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    check_tensor(who, "queries", queries)
    layout = f"[Q, {channels}] or [batch, Q, {channels}]"
    if queries.dim() not in (2, 3):
        raise ValueError(
            f"{who}: expected queries of 2 or 3 dimensions {layout}, got {queries.dim()}: {tuple(queries.shape)}; "
            "flatten their positions into one dimension"
        )
    check_channels(who, "queries", queries, layout, channels, "queries_dim")
    if queries.dim() == 3 and queries.shape[0] != 1 and queries.shape[0] != batch:
        raise ValueError(
            f"{who}: expected queries for a batch of {batch}, like data: {layout}, got {tuple(queries.shape)}; "
            "give 2-dimensional queries if the whole batch shares them"
        )
    check_real(who, "queries", queries, like)
    return queries if queries.dim() == 3 else queries.unsqueeze(0)


def check_ids(who: str, ids: Tensor, num_tokens: int, max_length: int, like: Tensor) -> None:
    """Check token ids ``[batch, n]`` of a language model.

    Args:
        who: the model's name, for messages.
        ids: what to check.
        num_tokens, max_length: the size of the vocabulary, and the most tokens of a sequence.
        like: a parameter of the model, whose device is expected.

    Raises:
        TypeError, ValueError, IndexError: the message says expected, got and what to do.
    """
    check_tensor(who, "x", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{who}: expected token ids of dtype torch.int64 or int32, got {ids.dtype}; use x.long()")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(
            f"{who}: expected token ids of 2 dimensions [batch, n], n at least 1, got {tuple(ids.shape)}; "
            "add the batch dimension, or drop empty sequences"
        )
    if ids.shape[1] > max_length:
        raise ValueError(
            f"{who}: expected at most {max_length} tokens (max_seq_len={max_length}), got {ids.shape[1]}; "
            f"cut the sequence, or build the model with max_seq_len={ids.shape[1]}"
        )
    check_device(who, "x", ids, like)
    # Values are checked only where they are there, on the CPU; on a GPU the host would have to wait for them. Ids that
    # are not checked here are checked by the embedding.
    traced = torch.compiler.is_compiling() or intercepted()
    has_values = not (traced or type(ids) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(ids))
    if has_values and ids.device.type == "cpu" and ids.numel() > 0:
        low, high = (bound.item() for bound in ids.aminmax())
        if low < 0 or high >= num_tokens:
            raise IndexError(
                f"{who}: expected token ids in 0..{num_tokens - 1} (num_tokens={num_tokens}), got {low}..{high}; "
                f"fix the tokenizer, or build the model with num_tokens={high + 1}"
            )
