"""Decoding for queries that are described: their tensor is built only where the decoder's modules have to be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers.decoding import FusedDecoder, plan_decoder, why_decoder_modules
from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.layers.observer import observer
from perceiver_fast.tokens import Description, PointDescription

if TYPE_CHECKING:
    import numpy as np

PART = 2**23  # numbers that describe queries, existing at a time in inference: raw channels or codes
PLAIN = 4  # of a query on a grid without channels of its own: its scale, in float64, and how that comes about


def check_out(who: str, out: Tensor | np.ndarray, batch: int, queries: Description) -> Tensor:
    """``[B, Q, O]`` of an ``out`` that has one dimension for the queries, or those of their grid.

    Raises:
        TypeError, ValueError: the message says expected, got and what to do.
    """
    if not isinstance(out, Tensor):
        if not hasattr(out, "flags"):
            raise TypeError(f"{who}: expected out as a tensor or a numpy array, got {type(out).__name__}")
        if not out.flags.writeable:
            raise ValueError(f"{who}: expected out to be writable, got a read-only array; open a memmap with mode='r+'")
        out = torch.from_numpy(out)
    if not out.is_floating_point():
        raise TypeError(f"{who}: expected out of floating point, got {out.dtype}; outputs would be cut to integers")
    for sizes in ((queries.count,), queries.sizes):
        if out.dim() == 2 + len(sizes) and out.shape[:-1] == (batch, *sizes) and out.is_contiguous():
            return out.view(batch, queries.count, out.shape[-1])
    raise ValueError(
        f"{who}: expected out, contiguous, of {batch} x {' x '.join(map(str, queries.sizes))} x the output's channels, got "
        f"{tuple(out.shape)}{'' if out.is_contiguous() else ', not contiguous'}"
    )


def decode_described(
    queries: Description,
    latents: Tensor,
    attention: nn.Module,
    to_logits: nn.Module | None,
    after: Callable[[Tensor], Tensor],
    built: Callable[[Tensor], Tensor],
    rows: int | None,
    out: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    """The output ``[B, Q, O]`` for described queries.

    Args:
        queries: the description.
        latents: what they attend to, ``[B, N, D]``.
        attention: the decoder's PreNorm.
        to_logits: the last layer, where nothing stands between it and the attention; else None.
        after: whatever follows the attention, ``to_logits`` included.
        built: decodes a tensor of queries ``[B, q, D]``.
        rows: queries that are decoded at once in inference, where they or what follows the attention is built. None: all,
            since a layer may mix them.
        out: ``[B, Q, O]``, is written to and returned, in inference. Default: a new tensor.
        progress: show it, part by part.
    """
    batch = latents.shape[0]
    last = to_logits if is_plain(to_logits, nn.Linear) else None
    looks, plan, decoder = observer(), None, None
    if (looks is None or not looks.needs_queries) and why_decoder_modules(attention, queries) is None:
        plan = plan_decoder(attention, last, latents, queries)
    if plan is None or plan.path == "built":

        def decode(part: Description) -> Tensor:
            return built(part.tensor(latents).expand(batch, -1, -1))

    else:
        if looks is not None:
            shape = torch.Size((batch, queries.count, queries.channels))
            looks.begins(attention, shape, residual=False)
            looks.decodes(attention, shape, latents, plan)
        backend: Any = plan.taken.backend  # a plan has one
        decoder = FusedDecoder(attention, last, latents, backend)
        done = last is not None or type(to_logits) is nn.Identity

        def decode(part: Description) -> Tensor:
            found = decoder.decode(part.describe(latents))
            return found if done else after(found)

        if done:
            numbers = (
                queries.code_channels if isinstance(queries, PointDescription) or queries.feat is not None else PLAIN
            )
            rows = max(1, PART // numbers)
    whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if (whole or rows is None) and out is None:
        return decode(queries)
    result: Any = out  # until the first part is there it may be None
    start, parts = 0, list(queries.parts(queries.count if rows is None else rows))
    for part in _shown(parts) if progress else parts:
        stop = start + part.count
        if decoder is not None and done:
            if result is None:
                result = latents.new_empty(batch, queries.count, decoder.channels, dtype=decoder.dtype)
            decoder.decode_into(_of_channels(result, decoder.channels)[:, start:stop], part.describe(latents))
        else:
            found = decode(part)
            if result is None:
                result = found.new_empty(batch, queries.count, found.shape[-1])
            _of_channels(result, found.shape[-1])[:, start:stop] = found
        start = stop
    return result


def _of_channels(out: Tensor, channels: int) -> Tensor:
    if out.shape[-1] != channels:
        raise ValueError(
            f"decode_into: expected out [.., {channels}], as many channels as the output, got {tuple(out.shape)}"
        )
    return out


def _shown(parts: list[Description]) -> Iterable[Description]:
    """The parts, one after the other, with a bar that says how many are done."""
    from rich.console import Console
    from rich.progress import track

    return track(parts, "decoding", console=Console(stderr=True))
