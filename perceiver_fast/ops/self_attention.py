"""Attention among latents: on the CPU by this package's kernels, elsewhere by torch's fused attention.

The kernels stream tokens as torch's do, with logits and sums in float32 for half precision too, and are faster at nearly
every size. And they take out of the gradients what the rounding of a softmax's derivative leaves in them, which torch's
keep: of a saturated softmax, whose gradients are zero, that is all there is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from perceiver_fast import extension
from perceiver_fast.backends import forced_backend
from perceiver_fast.ops.cross_attention import CrossAttentionFunction, cross_attention_unchecked, kernel_dtype
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.library import FLOATING, cpu_error, dropout_seed, learns, unless_autocast
from perceiver_fast.ops.sdpa import HALF, sdpa
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import PLAIN, intercepted

OP = "self_attention"


def self_attention_backend(dtype: torch.dtype, device: torch.device) -> str:
    """What runs attention among latents: ``"cpu"``, this package's kernels, or ``"sdpa"``, torch's.

    torch's half-precision kernels multiply in tiles where a CPU has them (AMX), and are kept there.
    """
    if device.type != "cpu" or dtype not in FLOATING or forced_backend() not in ("auto", "cpu"):
        return "sdpa"
    if cpu_error(extension.error) is not None or (dtype in HALF and torch.cpu._is_amx_tile_supported()):
        return "sdpa"
    return "cpu"


@op_range(OP)
def self_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention of latents to each other; inputs are not checked.

    Args:
        q, k: ``[B, H, N, d]``, floating point, of one dtype.
        v: ``[B, H, N, dv]``, the dtype of q.
        dropout: probability of dropping an attention weight. Default: 0.
        scale: of the logits. Default: 1 / sqrt(d).

    Returns:
        ``[B, H, N, dv]``, the dtype of q, autocast or not. Differentiable any number of times; with dropout on a GPU once.
        Graphs that are traced or compiled, and modes that see operators one by one, have torch's own operator.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.self_attention import self_attention
        >>> self_attention(*torch.randn(3, 1, 2, 5, 8)).shape
        torch.Size([1, 2, 5, 8])
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.shape[2] == 1:
        q = q * 0  # a softmax over one latent is constant: this makes its gradient exactly zero, as it should be
    if q.shape[-1] != v.shape[-1]:  # torch's fused kernels want as many channels, and would form the N x N weights
        out: Any = cross_attention_unchecked(q, k, v, None, dropout, scale=scale)
        return out
    if torch.compiler.is_compiling() or type(q) not in PLAIN or intercepted() or transformed():
        return sdpa(q, k, v, dropout=dropout, scale=scale)
    if self_attention_backend(q.dtype, q.device) == "sdpa":
        return sdpa(q, k, v, dropout=dropout, scale=scale)
    compute = kernel_dtype(q.dtype)
    arguments = (
        *(t.transpose(1, 2).to(compute).transpose(1, 2) for t in (q, k, v)),  # rows as they lie, of all heads at once
        None,
        scale,
        dropout,
        dropout_seed(dropout, q.device),
        False,
    )
    with unless_autocast(q.device):
        if learns(q, k, v):
            o, _ = CrossAttentionFunction.apply(*arguments)
        else:
            o, *_ = torch.ops.perceiver_fast.cross_attention_forward(*arguments)
    return o.to(q.dtype)
