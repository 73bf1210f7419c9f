"""Attention weights from logits, for all tokens or for a block of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The log-sum-exp of a row that is all masked, in every dtype and on every backend: float32's least number. It is finite,
# so that nothing that is computed from it and then left out is NaN.
EMPTY_LSE = -3.4028234663852886e38
NOBODY = -1e30  # a log-sum-exp below it is of tokens that are all masked
EPS = 1e-8  # the least normaliser of inverted attention, as in perceiver-pytorch


def block_weights(logits: Tensor, mask: Tensor | None, inverted: bool) -> tuple[Tensor, Tensor]:
    """Weights of a block of tokens, as if there were no other tokens, and a statistic by which blocks are put together.

    Args:
        logits: ``[.., N, M]``.
        mask: bool, broadcast over logits, True where a token may be attended to; a row that is all False attends
            uniformly.
        inverted: softmax over the queries.

    Returns:
        Weights ``[.., N, M]`` and ``[.., N]``, which is float32 at least: the softmax over the tokens and its
        log-sum-exp, or (inverted) the softmax over the queries and its sum over the tokens.
    """
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.finfo(logits.dtype).max)
    if not inverted:
        return logits.softmax(-1), at_least_float32(logits).logsumexp(-1)
    weight = logits.softmax(-2)
    if mask is not None:
        weight = weight.masked_fill(~mask, 0.0)
    return weight, at_least_float32(weight).sum(-1)


def attention_weights(logits: Tensor, mask: Tensor | None, inverted: bool) -> tuple[Tensor, Tensor]:
    """Attention weights over all tokens.

    Args:
        logits, mask, inverted: see :func:`block_weights`.

    Returns:
        Weights ``[.., N, M]``, and ``[.., N]`` the log-sum-exp of the logits, ``EMPTY_LSE`` for a row that is all False;
        inverted, that of the sum over the tokens, before ``EPS`` bounds it, and at least that of the dtype's least
        normal number.
    """
    weight, statistic = block_weights(logits, mask, inverted)
    if not inverted:
        return weight, statistic if mask is None else statistic.masked_fill(~mask.any(-1), EMPTY_LSE)
    # float16 has no number as small as the least normaliser.
    weight = F.normalize(at_least_float32(weight), p=1, dim=-1, eps=EPS).to(weight.dtype)
    return weight, inverted_lse(statistic)


def inverted_lse(total: Tensor) -> Tensor:
    """Inverted attention's statistic of a query: the logarithm of its sum over the tokens, which may be zero.

    Not of the normaliser, that sum but at least ``EPS``: sums of parts of the tokens add up, normalisers do not.
    """
    return total.clamp_min(torch.finfo(total.dtype).tiny).log()


def at_least_float32(t: Tensor) -> Tensor:
    """``t``, in float32 where it is in half precision."""
    return t if t.dtype == torch.float64 else t.float()
