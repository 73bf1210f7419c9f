"""Attention over keys and values that exist as tensors: what remains where no identity applies.

    S = scale q k^T,    P = softmax over tokens of S,    o = P v

and, inverted, ``P[n, m] = A[n, m] / sum_m A[n, m]`` with ``A = softmax over queries of S``. Tokens are streamed in
tiles and the backward recomputes P, so memory is O(N + M) for any number of queries, tokens and channels, with masks,
dropout and inverted attention too. On GPUs torch's scaled_dot_product_attention runs what its fused kernels take and
are expected to be fast at, and Triton kernels run the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from perceiver_fast import extension, reference
from perceiver_fast.backends import Backend
from perceiver_fast.gpu import INTERPRETED
from perceiver_fast.ops import blocks
from perceiver_fast.ops.cross_attention_checks import OP, check
from perceiver_fast.ops.declaration import Operator, declare
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.library import (
    compute_dtype,
    cpu_error,
    dropout_seed,
    kernel_reasons,
    triton_reasons,
    unless_autocast,
)
from perceiver_fast.ops.sdpa import sdpa, slow_reasons
from perceiver_fast.ops.work import Shape, Work, attention_work
from perceiver_fast.ranges import op_range
from perceiver_fast.reference.softmax import EMPTY_LSE
from perceiver_fast.tracing import own


@dataclass(frozen=True)
class CrossAttentionCall:
    """What the choice of a backend may depend on; sizes that are None are not known."""

    dtype: torch.dtype
    device: torch.device
    dropout: float = 0.0
    inverted: bool = False
    lse: bool = False
    masked: bool = False
    batch: int | None = None
    heads: int | None = None
    queries: int | None = None
    dim: int | None = None
    value_dim: int | None = None


def _cpu_reasons(call: CrossAttentionCall) -> list[str]:
    return kernel_reasons(cpu_error(extension.error), "cpu", call.device, call.dtype)


def _triton_reasons(call: CrossAttentionCall) -> list[str]:
    reasons = triton_reasons(call.device, call.dtype)
    if call.value_dim == 0:
        reasons.append("the values have no channels")
    return reasons


def _sdpa_reasons(call: CrossAttentionCall) -> list[str]:
    reasons = []
    if call.inverted:
        reasons.append("inverted attention normalises over the latents")
    if call.dropout > 0 and call.device.type == "cpu":
        reasons.append(f"attention dropout {call.dropout:g} is on")
    if call.lse:
        reasons.append("it does not return the log-sum-exp")
    slow = [] if reasons or _triton_reasons(call) else slow_reasons(call)
    return slow if slow and not CROSS_ATTENTION.cannot("triton", call) else reasons


def _backward_work(q: Shape, k: Shape, v: Shape, inverted: bool, to_tokens: bool = True) -> Work:
    """Logits and weights' gradients (inverted: twice), then the gradients of q, and of k and v."""
    pairs, passes = math.prod(q[:-1]) * k[-2], 1 + inverted
    grads = q[-1] + (q[-1] + v[-1] if to_tokens else 0)
    return Work(pairs * (passes * (q[-1] + v[-1]) + grads), passes * pairs)


def _forward_outputs(q, k, v, mask, scale, dropout, seed, inverted):
    lse = q.new_empty(q.shape[:3], dtype=torch.float64)
    dtype = compute_dtype(q.dtype) if _runs_cpu_kernels(q) else q.dtype  # the CPU's kernels do not round it
    return _rows(q, v.shape[3], dtype), lse, lse.new_empty(k.shape[:3] if inverted else (0,))


def _runs_cpu_kernels(q):
    """Whether the CPU's kernels run the operators."""
    return q.device.type == "cpu" and not INTERPRETED


def _rows(q, channels, dtype):
    """``[B, H, N, channels]``; the CPU's kernels write rows of heads beside one another, as what comes next reads them."""
    batch, heads, queries, _ = q.shape
    sizes = batch, heads, queries, channels
    if _runs_cpu_kernels(q):
        strides = queries * heads * channels, channels, heads * channels, 1
        return q.new_empty_strided(sizes, strides, dtype=dtype)
    return q.new_empty(sizes, dtype=dtype)


def _backward_outputs(d_o, d_lse, q, k, v, mask, scale, dropout, seed, inverted, o, lse, token_lse, to_tokens):
    """dq, and dk and dv, which are empty where nobody needs them."""
    return _rows(q, q.shape[3], q.dtype), *(t.new_empty(t.shape if to_tokens else (0,)) for t in (k, v))


def _sample(make, dtype=torch.float32, channels=8, options=False, queries=5, tokens=9, inverted=False, learn=True):
    """With options it has a mask and dropout. Rows begin at multiples of 16 channels, as in most views of heads."""
    q, k, v = (
        make(2, 2, rows, channels + -channels % 16, dtype=dtype)[..., :channels] for rows in (queries, tokens, tokens)
    )
    mask, dropout, seed = (make.mask(2, tokens), 0.1, make.seed()) if options else (None, 0.0, None)
    k, v = (k, v) if learn else (k.detach(), v.detach())
    return CrossAttentionFunction.apply(q, k, v, mask, channels**-0.5, dropout, seed, inverted)


def _instances():
    """By dtype, channels, and with options, as of many queries to few tokens, or without, as of few to many; inverted."""
    for dtype, channels, options in (
        *((torch.bfloat16, *call) for call in ((64, False), (64, True), (128, True), (261, False), (322, True))),
        (torch.float16, 512, False),
        (torch.float32, 64, True),
        (torch.float32, 261, False),
    ):
        name = f"{str(dtype).removeprefix('torch.')}, {channels} channels{', mask and dropout' if options else ''}"
        queries, tokens = (50176, 512) if options else (512, 50176)
        yield name, dict(dtype=dtype, channels=channels, options=options, queries=queries, tokens=tokens)
    for dtype, channels in ((torch.bfloat16, 64), (torch.bfloat16, 262), (torch.float32, 64), (torch.float32, 262)):
        name = f"{str(dtype).removeprefix('torch.')}, {channels} channels, inverted, mask and dropout"
        yield name, dict(dtype=dtype, channels=channels, options=True, queries=512, tokens=50176, inverted=True)


def _trial(make, dtype):
    q, k, v = (make(2, 2, rows, 24, dtype=dtype) for rows in (20, 70, 70))
    mask = make.mask(2, 70)
    return *cross_attention(q, k, v, mask, return_lse=True), cross_attention(q, k, v, mask, inverted=True)


CROSS_ATTENTION = declare(
    OP,
    backends=(
        Backend("cpu", _cpu_reasons),
        Backend("sdpa", _sdpa_reasons),
        Backend("triton", _triton_reasons),
        Backend("reference", lambda call: []),
    ),
    call=CrossAttentionCall,
    operators=(
        Operator(
            "cross_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, float dropout, "
            "Tensor? seed, bool inverted) -> (Tensor o, Tensor lse, Tensor token_lse)",
            _forward_outputs,
            work=lambda *a: attention_work(a[0], a[1], a[2], inverted=a[7]),
            triton="cross_attention.forward",
        ),
        Operator(
            "cross_attention_backward(Tensor d_o, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor? mask, "
            "float scale, float dropout, Tensor? seed, bool inverted, Tensor o, Tensor lse, Tensor token_lse, bool to_tokens) "
            "-> (Tensor dq, Tensor dk, Tensor dv)",
            _backward_outputs,
            work=lambda *a: _backward_work(a[2], a[3], a[4], inverted=a[9], to_tokens=a[13]),
            triton="cross_attention_backward.backward",
        ),
    ),
    sample=_sample,
    trial=_trial,
    variants=(
        {},
        dict(options=True),
        dict(inverted=True),
        dict(dtype=torch.float64, channels=17),
        dict(learn=False),
    ),
    instances=dict(_instances()),
)


def kernel_dtype(dtype: torch.dtype, keep_lse: bool = False) -> torch.dtype:
    """The dtype that queries, keys and values are given to the CPU's kernels in.

    They take bfloat16, but return the log-sum-exp of weights that are rounded to it: who wants that, has float32.
    """
    return dtype if dtype == torch.bfloat16 and not keep_lse else compute_dtype(dtype)


class CrossAttentionFunction(torch.autograd.Function):
    """Connects the registered forward and backward; saves its inputs, o and statistics, nothing of size N x M."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, dropout, seed, inverted):
        o, lse, token_lse = torch.ops.perceiver_fast.cross_attention_forward(
            q, k, v, mask, scale, dropout, seed, inverted
        )
        ctx.save_for_backward(q, k, v, mask, seed, o, lse, token_lse)
        ctx.options = scale, dropout, inverted
        ctx.set_materialize_grads(False)
        return o if o.dtype == q.dtype else o.to(q.dtype), lse

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o, d_lse):
        q, k, v, mask, seed, o, lse, token_lse = ctx.saved_tensors
        scale, dropout, inverted = ctx.options
        to_tokens = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]

        def kernel():
            d_out = torch.zeros_like(o, dtype=q.dtype) if d_o is None else d_o
            dq, dk, dv = torch.ops.perceiver_fast.cross_attention_backward(
                d_out, d_lse, q, k, v, mask, scale, dropout, seed, inverted, o, lse, token_lse, to_tokens
            )
            return (dq, dk, dv) if to_tokens else (dq, None, None)

        if differentiated_again():

            def form(*inputs):
                wide = (t.to(compute_dtype(t.dtype)) for t in inputs)
                found, lse = blocks.cross_attention(*wide, mask, scale, dropout, seed, inverted)
                return found.to(inputs[0].dtype), lse

            grads = differentiable(kernel, form, (q, k, v), (d_o, d_lse), ctx.needs_input_grad[:3])
        else:
            grads = kernel()
        return *grads, None, None, None, None, None


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of N queries to M tokens whose keys and values are given.

    Args:
        q: ``[B, H, N, d]``, floating point; may be expanded over B.
        k: ``[B, H, M, d]``, the dtype of q.
        v: ``[B, H, M, dv]``, the dtype of q; dv need not be d.
        mask: bool ``[B, M]``, True where a token may be attended to. Default: all. A row that is all False attends
            uniformly to all tokens, as perceiver-pytorch does.
        dropout: probability of dropping an attention weight. Which ones is a function of a seed that is drawn from
            torch's generator, and of indices: the number of threads does not matter. Default: 0.
        inverted: softmax over the queries, then normalised over the tokens. Default: False.
        scale: of the logits. Default: 1 / sqrt(d).
        return_lse: also return the natural log-sum-exp of the logits. Default: False.

    Returns:
        ``[B, H, N, dv]``, the dtype of q; with return_lse also lse ``[B, H, N]`` float64, -3.4e38 (float32's
        least number, in every dtype and on every backend) for a batch element that is all masked. float64 is computed in float64, all others in float32;
        weights of half precision are rounded to it, as everywhere, on GPUs and on CPUs that multiply bfloat16 in pairs
        (AVX-512 BF16, without AMX), but not beside a log-sum-exp there. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, size or device; the message says expected, got and what to do.
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.

    Source:
        Online softmax and recomputation as in Dao et al., "FlashAttention", NeurIPS 2022; inverted attention as in
        perceiver-pytorch 0.11.0, after Locatello et al., "Slot attention", NeurIPS 2020.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops import cross_attention
        >>> cross_attention(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 4)).shape
        torch.Size([1, 2, 5, 4])
    """
    check(q, k, v, mask, dropout, inverted, return_lse)
    return cross_attention_unchecked(q, k, v, mask, dropout, inverted, scale, return_lse)


@op_range(OP)
def cross_attention_unchecked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    inverted: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`cross_attention` for callers whose tensors fit each other; they are not checked.

    ``backend`` is what runs it, where that has been chosen already; ``seed`` dropout's, where it has been drawn already.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if transformed():
        return _transformed(q, k, v, mask, scale, dropout, inverted, return_lse, seed)
    if backend is None:
        shape = *q.shape, v.shape[3]
        call = CrossAttentionCall(q.dtype, q.device, dropout, inverted, return_lse, mask is not None, *shape)
        backend = CROSS_ATTENTION.require(call)
    if backend == "reference":
        seed = dropout_seed(dropout, q.device) if seed is None else seed
        plain = reference if q.device.type == "cpu" else blocks  # whose N x M weights a GPU has no memory for
        o, lse = plain.cross_attention(q, k, v, mask, scale, dropout, seed, inverted)
        return (o, lse) if return_lse else o
    empty = None
    if not inverted:
        q = _without_constants(q, k, mask, keep_lse=return_lse)
        if backend != "cpu":
            q, mask, empty = _without_empty_rows(q, mask)
    elif q.shape[2] == 1:  # a softmax over one query is constant: no gradient, exactly
        q = q * 0
    if backend == "sdpa":
        return sdpa(q, k, v, mask, dropout, scale)
    if backend == "cpu" and mask is not None:
        mask = own(mask)  # it is saved, and its owner may refill it before the backward
    compute = kernel_dtype(q.dtype, return_lse)
    if backend == "triton":  # tensor cores take half precision as it is, and sum in float32
        compute = q.dtype
        if scale <= 0:
            q, scale = q * scale, 1.0
    seed = dropout_seed(dropout, q.device) if seed is None else seed
    with unless_autocast(q.device):
        o, lse = CrossAttentionFunction.apply(
            q.to(compute), k.to(compute), v.to(compute), mask, scale, dropout, seed, inverted
        )
    o = o.to(q.dtype)
    if not return_lse:
        return o
    return o, lse if empty is None else lse.masked_fill(empty[:, None, None], EMPTY_LSE)


def _transformed(q, k, v, mask, scale, dropout, inverted, return_lse, seed) -> Tensor | tuple[Tensor, Tensor]:
    """The differentiable form, which torch.func's transforms see through."""
    compute = compute_dtype(q.dtype)
    if not inverted:
        by, *_ = _without_empty_rows(_without_constants(q, k, mask, keep_lse=return_lse), mask)
    else:
        by = q * 0 if q.shape[2] == 1 else q
    with unless_autocast(q.device):
        seed = dropout_seed(dropout, q.device) if seed is None else seed
        o, lse = blocks.cross_attention(
            by.to(compute), k.to(compute), v.to(compute), mask, scale, dropout, seed, inverted
        )
    return (o.to(q.dtype), lse) if return_lse else o.to(q.dtype)


def _without_constants(q: Tensor, k: Tensor, mask: Tensor | None, keep_lse: bool) -> Tensor:
    """Zero queries where the weights do not depend on them, so that their gradients are exactly zero.

    A batch element that sees a single token has a weight of one there, but its log-sum-exp is that token's logit.
    """
    if keep_lse:
        return q
    if mask is None:
        return q * 0 if k.shape[2] == 1 else q
    return q * (mask.sum(-1) > 1)[:, None, None, None]  # NaN stays NaN


def _without_empty_rows(q: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """For backends that have no uniform weights: zero queries and no mask, which make them.

    Returns:
        q, with zeros in the batch elements that are all masked, the mask without these (or None), and which they are,
        bool ``[B]`` (or None).
    """
    if mask is None:
        return q, None, None
    empty = ~mask.any(-1)
    return q.masked_fill(empty[:, None, None, None], 0.0), mask | empty[:, None], empty
