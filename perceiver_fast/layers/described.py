"""Tokens that the user describes, in the place of a tensor: their checks, and what layers make of a description."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_fast.layers.checks import check_device, check_mask, check_real
from perceiver_fast.layers.fusing import are_plain, watcher, why_not
from perceiver_fast.tokens import DenseTokens, Description, Tokens


def check_described(
    who: str, what: str, description: Description, like: Tensor, *, batch: int | None, channels: int, argument: str
) -> None:
    """Check a description.

    Args:
        who, what: the model's or layer's name and that of the input, for messages.
        description: what to check.
        like: a parameter of the model, whose dtype and device are expected; of positions the device.
        batch: the expected B; None for any.
        channels: the expected number of them.
        argument: the constructor's argument that sets it, for messages.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    if description.channels != channels:
        raise ValueError(
            f"{who}: expected {what} of {channels} channels ({argument}={channels}), got {description.channels}; change "
            f"their frequencies or feat, or give them embed=nn.Linear(.., {channels})"
        )
    for name in ("feat", "coords"):
        given = getattr(description, name, None)
        if given is None:
            continue
        if given.shape[0] not in (1, description.batch if batch is None else batch):
            raise ValueError(
                f"{who}: expected {what} for a batch of {description.batch if batch is None else batch}, got {name} "
                f"{tuple(given.shape)}; leave out the batch if it is shared"
            )
        (check_real if name == "feat" else check_device)(who, f"{name} of {what}", given, like)
    if description.count == 0:
        raise ValueError(f"{who}: expected {what} of at least one token, got none; drop empty inputs before the model")
    if description.embed is not None:
        check_real(who, f"the weight of embed of {what}", description.embed.weight, like)


def check_described_mask(
    who: str, what: str, mask: Tensor | None, description: Description, like: Tensor
) -> Tensor | None:
    """:func:`perceiver_fast.layers.checks.check_mask` for described tokens, which are where ``like`` is."""
    stand_in = like.new_empty(1).expand(description.batch)
    return check_mask(who, mask, what, stand_in, torch.Size(description.sizes))


def why_not_described(description: Description) -> str | None:
    """Why a description has to be built, as the user would build it, in words; None if layers may take it as it is."""
    found = None if description.embed is None else why_not("embed", description.embed, nn.Linear)
    if found is None and not are_plain(description.feat, getattr(description, "coords", None)):
        found = "feat or coords are no plain tensors"
    if found is None and description.bare:
        found = "positions without frequencies: a token may be constant, and LayerNorm needs it as it is"
    return found


def describe_keywords(who: str, layer: nn.Module | None, x: Tensor, keywords: dict) -> dict:
    """``keywords`` with what layers attend to in the place of a description that the user gave as ``context``.

    Args:
        who: the module that the user called, for messages.
        layer: a PreNorm with a context, or whatever was put in its place.
        x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them.
        keywords: may have a ``context`` and a ``mask``.

    Raises:
        TypeError, ValueError: a wrong dtype, size or device; the message says expected, got and what to do.
    """
    context = keywords.get("context")
    if not isinstance(context, Description):
        return keywords
    like = x if layer is None else next(layer.parameters(), x)
    shape = getattr(getattr(layer, "norm_context", None), "normalized_shape", (context.channels,))
    batch = None if x.shape[0] == 1 else x.shape[0]
    check_described(who, "context", context, like, batch=batch, channels=shape[-1], argument="context_dim")
    if batch is not None and context.batch != batch:
        context = context.expand(batch)
    mask = check_described_mask(who, "context", keywords.get("mask"), context, like)
    return keywords | {"context": described_tokens(context, like), "mask": mask}


def described_tokens(description: Description, like: Tensor) -> Tokens:
    """What layers attend to: the description; or the tensor, where somebody would notice that it is not built.

    Args:
        description: of the tokens.
        like: a parameter of the model, whose dtype and device are taken.
    """
    found = watcher() or why_not_described(description)
    if found is None:
        return description.describe(like)
    tokens = DenseTokens(description.tensor(like))
    tokens.kind = f"tokens that are built ({found})"
    return tokens
