"""Attention to all tokens from attention to parts of them: groups, chunks of a stream, shards on several processes.

    o = sum_k w_k o_k        w_k = exp(lse_k - lse)        lse = log sum_k exp(lse_k)

Inverted attention, ``o = sum_m A v / max(s, eps)`` with ``s = sum_m A``, has ``log s`` in the place of the log-sum-exp, and
``w_k = max(s_k, eps) / max(s, eps)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_fast.reference.softmax import EMPTY_LSE, EPS, NOBODY, inverted_lse


def merge_parts(
    outs: Sequence[Tensor], lses: Sequence[Tensor], counts: Sequence[int], inverted: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention to all parts from attention to each.

    Args:
        outs: ``[B, N, H, d]`` each.
        lses: ``[B, N, H]`` each, as ops return it: the log-sum-exp of the part's logits; below -1e30 where a part is all
            masked. Inverted: the logarithm of the sum over its tokens.
        counts: the parts' numbers of tokens: where all parts are masked, attention is uniform over all tokens.
        inverted: of inverted attention. Default: False.

    Returns:
        ``[B, N, H, d]``, and the same statistic of all tokens ``[B, N, H]``.
    """
    stacked = torch.stack(tuple(lses), -1)
    if inverted:
        total = stacked.exp().sum(-1)
        weight = stacked.exp().clamp_min(EPS) / total.clamp_min(EPS).unsqueeze(-1)
        lse = inverted_lse(total)
    else:  # a part that is all masked has weight 0; if all parts are, each is weighted by its number of tokens
        empty = stacked < NOBODY
        nobody = empty.all(-1)
        size = torch.tensor(counts, dtype=torch.float64).log().to(stacked)
        logits = torch.where(nobody.unsqueeze(-1), size, stacked.masked_fill(empty, -torch.inf))
        weight, lse = logits.softmax(-1), logits.logsumexp(-1).masked_fill(nobody, EMPTY_LSE)
    terms = [w.unsqueeze(-1).to(out.dtype) * out for w, out in zip(weight.unbind(-1), outs)]
    return sum(terms[1:], terms[0]), lse
