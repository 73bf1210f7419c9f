"""What inverted attention needs of every token: softmax over the queries, then normalised over the tokens.

    A = 2^(s - log2(e) token_lse),  T = sum_m A,  P = A / max(T, EPS)        token_lse: log-sum-exp over the queries
    x = (dP - delta) / max(T, EPS),  eta = sum_n A x,  dS = A (x - eta)       delta = sum_m P dP - d_lse; lse = ln T

A token's log-sum-exp comes to the walks of the other kernels as a whole number and a factor, A = 2^(s - shift) weight,
so that large ones are exact. It and ``eta``, which the softmax over the queries subtracts from the gradients of the
weights, are all that distinguishes inverted attention there.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from perceiver_fast.kernels.base2 import LOG2_E
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.reference.softmax import EPS

LOG_EPS = tl.constexpr(math.log(EPS))  # up to here a normaliser is a constant, and sum_m P dP is no part of delta
LOG_TINY = tl.constexpr(math.log(torch.finfo(torch.float32).tiny))  # of no sum at all
BLOCK = 256  # tokens of a program


@triton.jit
def whole_and_factor(lse):
    """``(whole, factor)`` with ``2^(s - whole) factor = 2^(s - log2(e) lse)``: fp32 of fp64 log-sum-exps.

    As a single float32 a large log-sum-exp would be rounded by so much that weights would be wrong.
    """
    exact = lse * LOG2_E
    whole = tl.floor(exact).to(tl.float32)  # not quite its floor beyond 2^24: the factor makes up for that as well
    return whole, tl.math.exp2((whole.to(tl.float64) - exact).to(tl.float32))


@triton.jit
def cross_attention_tokens_kernel(token_lse, mask, shift, weight, heads, tokens, mask_b, count, BLOCK: tl.constexpr):
    """Of every token its log-sum-exp as a whole number and a factor; masked ones get zeros, whatever theirs is.

    Grid: a program a BLOCK of tokens; those beyond the last are not written.

        token_lse      [B H, M]  in   fp64
        mask           [B, M]    in   bool, stride mask_b, tokens dense; or None
        shift, weight  [B H, M]  out  fp32

        heads, tokens, count  H, M, B H M
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    whole, factor = whole_and_factor(tl.load(token_lse + i, mask=there, other=0.0))
    if mask is not None:
        seen = tl.load(mask + i // tokens // heads * mask_b + i % tokens, mask=there, other=0) != 0
        whole, factor = tl.where(seen, whole, 0.0), tl.where(seen, factor, 0.0)
    tl.store(shift + i, whole, mask=there)
    tl.store(weight + i, factor, mask=there)


def token_terms(token_lse: Tensor | None, arguments: dict) -> tuple[list[Launch], dict[str, Tensor | None]]:
    """The launch that makes ``token_shift`` and ``token_weight [B, H, M]``, and these; both None without token_lse.

    ``arguments`` are those that all passes take (cross_attention.common).
    """
    if token_lse is None:
        return [], dict(token_shift=None, token_weight=None)
    shift, weight = token_lse.new_empty(2, *token_lse.shape, dtype=torch.float32)
    numbers = {name: arguments[name] for name in ("mask", "heads", "tokens", "mask_b")}
    numbers |= dict(token_lse=token_lse, shift=shift, weight=weight, count=shift.numel(), BLOCK=BLOCK)
    launch = Launch(cross_attention_tokens_kernel, triton.cdiv(shift.numel(), BLOCK), numbers)
    return [launch], dict(token_shift=shift, token_weight=weight)
