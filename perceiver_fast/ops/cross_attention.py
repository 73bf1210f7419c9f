"""Attention over keys and values that were built: what remains where no identity applies.

    o = softmax(q k^T / sqrt(d)) v

torch's scaled_dot_product_attention runs it without an N x M matrix; attention dropout and inverted attention run in
plain PyTorch with one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perceiver_fast import backends, reference
from perceiver_fast.backends import Backend, Choice

OP = "cross_attention"


@dataclass(frozen=True)
class CrossAttentionCall:
    """What the choice of a backend may depend on."""

    dropout: float = 0.0
    inverted: bool = False


def _sdpa_reasons(call: CrossAttentionCall) -> list[str]:
    reasons = []
    if call.dropout > 0:
        reasons.append(f"attention dropout {call.dropout:g} is on")
    if call.inverted:
        reasons.append("inverted attention normalises over the latents")
    return reasons


BACKENDS = (Backend("sdpa", _sdpa_reasons), Backend("reference", lambda call: []))


def choose_cross_attention(call: CrossAttentionCall) -> Choice:
    """The backend that runs ``call``."""
    return backends.choose(OP, BACKENDS, call)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, inverted: bool = False
) -> Tensor:
    """Attention of N queries to M tokens whose keys and values are given.

    Args:
        q: ``[B, H, N, d]``.
        k: ``[B, H, M, d]``.
        v: ``[B, H, M, dv]``.
        mask: bool ``[B, M]``, True where a token may be attended to. Default: all. A row that is all False attends
            uniformly to all tokens, as perceiver-pytorch does.
        dropout: probability of dropping an attention weight. Default: 0.
        inverted: softmax over the queries, then normalised over the tokens. Default: False.

    Returns:
        ``[B, H, N, dv]``, the dtype of q.

    Raises:
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import cross_attention
        >>> cross_attention(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 4)).shape
        torch.Size([1, 2, 5, 4])
    """
    if backends.require(choose_cross_attention(CrossAttentionCall(dropout, inverted))).backend == "reference":
        return reference.cross_attention(q, k, v, mask, dropout, inverted)
    bias = None
    if mask is not None:
        # A row that is all masked is uniform and its logits are constants: zero queries and no mask do just that.
        empty = ~mask.any(-1, keepdim=True)
        q = q.masked_fill(empty[:, None, None], 0.0)
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~(mask | empty), torch.finfo(q.dtype).min)[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
