"""torch's fused attention, with derivatives of every order and with the NaN that softmax has.

torch's fused kernels have one derivative, and the CPU's returns numbers where a softmax is NaN: for a query whose logits
are all -inf, and with fewer tokens than a vector has lanes for one whose logits are all NaN. Its log-sum-exp is zero
there, which others are by chance alone, and such calls run the differentiable form, ops/blocks.py's. In half precision
there are more cases, and not all show in the log-sum-exp: queries and keys are looked at, too.

On a GPU, what none of torch's fused kernels takes runs the differentiable form, too: torch would form the N x M weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from perceiver_fast.gpu import INTERPRETED, multiprocessors
from perceiver_fast.ops import blocks
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.library import compute_dtype, dropout_seed, learns, unless_autocast
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import PLAIN, intercepted

OP = "sdpa"
FLASH, MATH = SDPBackend.FLASH_ATTENTION.value, SDPBackend.MATH.value
HALF = torch.bfloat16, torch.float16


def slow_reasons(call: Any) -> list[str]:
    """Why torch's attention is expected to be slower than the Triton kernels with this call of cross_attention.

    Reasoned from what its kernels do, not measured. Flash attention takes half precision with up to 256 channels,
    a multiple of 8, the same of values, and no mask; the memory-efficient kernel any number that is a multiple of
    16 bytes, but leaves a GPU idle that its blocks of 64 queries do not fill.
    """
    if INTERPRETED:
        return ["TRITON_INTERPRET=1 puts the interpreted Triton kernels in its place"]
    dim, value_dim = call.dim, call.value_dim
    if dim is None or value_dim is None:
        return []
    half = call.dtype != torch.float32
    if half and dim == value_dim and dim <= 256 and dim % 8 == 0 and not call.masked:
        return []
    multiple = 8 if half else 4
    for channels in (dim, value_dim):
        if channels % multiple != 0:
            return [f"torch's fused attention takes no head of {channels} channels in {call.dtype}"]
    if call.batch is None or call.heads is None or call.queries is None:
        return []
    blocks, most = call.batch * call.heads * ((call.queries + 63) // 64), multiprocessors(call.device)
    if 2 * blocks < most:
        return [f"torch's fused attention does not split tokens: {blocks} blocks of queries on {most} multiprocessors"]
    return []


def _differentiate_again(grad_inputs, grad_outputs):
    """A hook on the node of torch's CPU kernel: gradients that can be differentiated, where they will be.

    It costs a fraction of what an autograd function in Python does, which shows in small models.
    """
    if not differentiated_again():
        return None
    node = torch._C._current_autograd_node()
    q, k, v = node._saved_query, node._saved_key, node._saved_value
    bias, scale = node._saved_attn_mask, node._saved_scale
    needed = [grad is not None for grad in grad_inputs[:3]]
    return (*_second(q, k, v, bias, scale, grad_outputs[0], needed, lambda: grad_inputs[:3]), *grad_inputs[3:])


def _second(q, k, v, bias, scale, d_o, needed, kernel) -> tuple[Tensor | None, ...]:
    mask = None if bias is None else bias[:, 0, 0] == 0

    def form(q, k, v):
        return _form(q, k, v, mask, scale)

    return differentiable(
        lambda: tuple(g if g is None else g.detach() for g in kernel()), form, (q, k, v), (d_o,), needed
    )


class _FlashOnCPU(torch.autograd.Function):
    """torch's CPU kernel and its own backward, where saved tensors are packed: a node's cannot be asked for twice."""

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        o, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        ctx.save_for_backward(q, k, v, bias, o, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o, _):
        q, k, v, bias, o, lse = ctx.saved_tensors
        scale = ctx.scale

        def kernel():
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d_o, q, k, v, o, lse, 0.0, False, attn_mask=bias, scale=scale
            )

        if not differentiated_again():
            return *kernel(), None, None
        return *_second(q, k, v, bias, scale, d_o, ctx.needs_input_grad[:3], kernel), None, None


class _Fused(torch.autograd.Function):
    """Whatever kernel torch chooses on another device, with its backward: the graph of the one call is saved."""

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, dropout, scale):
        inputs = [t.detach().requires_grad_(need) for t, need in zip((q, k, v), ctx.needs_input_grad)]
        with torch.enable_grad():
            o = F.scaled_dot_product_attention(*inputs, attn_mask=bias, dropout_p=dropout, scale=scale)
        ctx.save_for_backward(q, k, v, mask)
        ctx.call = inputs, o
        ctx.options = dropout, scale
        return o.detach()

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o):
        q, k, v, mask = ctx.saved_tensors
        (inputs, o), (dropout, scale), needed = ctx.call, ctx.options, ctx.needs_input_grad[:3]

        def kernel():
            wanted = [t for t, need in zip(inputs, needed) if need]
            found = iter(torch.autograd.grad(o, wanted, d_o.detach(), retain_graph=True))
            return tuple(next(found) if need else None for need in needed)

        if not differentiated_again():
            return *kernel(), None, None, None, None

        def form(q, k, v):
            if dropout > 0:
                raise RuntimeError(
                    f"{OP}: expected no dropout of attention weights in a second derivative, got {dropout:g}: torch's "
                    "fused kernels do not say which weights they dropped. Set it to 0, or call the model inside "
                    "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
                )
            return _form(q, k, v, mask, scale)

        return *differentiable(kernel, form, (q, k, v), (d_o,), needed), None, None, None, None


def _form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """The differentiable form."""
    compute = compute_dtype(q.dtype)
    seed = dropout_seed(dropout, q.device)
    o, _ = blocks.cross_attention(q.to(compute), k.to(compute), v.to(compute), mask, scale, dropout, seed, False)
    return o.to(q.dtype)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """:func:`torch.nn.functional.scaled_dot_product_attention` by torch's kernels; inputs are not checked.

    Args:
        q: ``[B, H, N, d]``, floating point.
        k: ``[B, H, M, d]``, the dtype of q.
        v: ``[B, H, M, dv]``, the dtype of q.
        mask: bool ``[B, M]``, True where a token may be attended to. Default: all. A row that is all False attends
            uniformly to all tokens.
        dropout: probability of dropping an attention weight. Default: 0.
        scale: of the logits. Default: 1 / sqrt(d).

    Returns:
        ``[B, H, N, dv]``, the dtype of q, autocast or not. Differentiable any number of times; with dropout on a GPU once,
        and a second derivative raises RuntimeError.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.sdpa import sdpa
        >>> sdpa(torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)).shape
        torch.Size([1, 2, 5, 8])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not torch._C._is_any_autocast_enabled():
        return _sdpa(q, k, v, mask, dropout, scale)
    with unless_autocast(q.device):
        return _sdpa(q, k, v, mask, dropout, scale)


def _sdpa(q, k, v, mask, dropout, scale) -> Tensor:
    if transformed():
        return _form(q, k, v, mask, scale, dropout)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(~mask, torch.finfo(q.dtype).min)[:, None, None, :]
    device = q.device.type
    if device != "cpu" and q.dtype == torch.float64:  # there is no fused kernel
        return _form(q, k, v, mask, scale, dropout)
    if torch.compiler.is_compiling() or type(q) not in PLAIN or intercepted() or device == "meta":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)
    if device == "cpu":
        if torch._fused_sdp_choice(q, k, v, bias, dropout, False, scale=scale) == FLASH:
            return _flash_on_cpu(q, k, v, bias, mask, scale)
    elif device == "cuda" and torch._fused_sdp_choice(q, k, v, bias, dropout, False, scale=scale) == MATH:
        return _form(q, k, v, mask, scale, dropout)
    elif learns(q, k, v):
        return _Fused.apply(q, k, v, bias, mask, dropout, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def _flash_on_cpu(q, k, v, bias, mask, scale) -> Tensor:
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None and learns(q, k, v):
        o, lse = _FlashOnCPU.apply(q, k, v, bias, scale)
    else:
        o, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
        if o.requires_grad:
            node: Any = o.grad_fn
            node.register_hook(_differentiate_again)
    return o if _regular(q, k, lse) else _form(q, k, v, mask, scale)


def _regular(q: Tensor, k: Tensor, lse: Tensor) -> bool:
    """Whether the kernel's NaN are those of a softmax, or there are none."""
    if q.dtype not in HALF:
        return lse.count_nonzero().item() == lse.numel()
    lse = lse.detach().abs()
    total = q.detach().sum(dtype=torch.float32) + k.detach().sum(dtype=torch.float32)
    return math.isfinite((lse.reciprocal().add_(lse).sum() + total).item())
