"""Cross-attention to tokens that are read in chunks: one chunk exists at a time, in the forward and in the backward.

With ``w_k = exp(lse_k - lse)`` of a chunk, known once all have been read, the backward needs of every chunk

    d(w_k o_k) = d_o        d w_k = -d_o . o + d_lse

and computes the chunk's own backward from these, chunk by chunk, from inputs that are read again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perceiver_fast.backends import forced_again, forced_backend
from perceiver_fast.float64 import in_float64
from perceiver_fast.reference.softmax import EPS, NOBODY
from perceiver_fast.tokens.merging import merge_parts
from perceiver_fast.tokens.streams import TokenStream
from perceiver_fast.tracing import uncompiled


@uncompiled  # a graph has no place for reading
def attend_stream(layer: Any, z: Tensor, tokens: TokenStream, inverted: bool) -> tuple[Tensor, Tensor]:
    """Attention to all chunks: ``[B, N, H, d]``, and the log-sum-exp ``[B, N, H]`` (inverted: of the sums).

    Args:
        layer: the cross-attention, a FusedCrossAttention.
        z: normalised latents ``[B or 1, N, D]``.
        tokens: what is attended to.
        inverted: softmax over the latents, then normalised over the tokens.

    Raises:
        RuntimeError: the source can be read once only, and the backward would read it again.
    """
    inputs = (*layer.tensors(z), *tokens.parameters)
    if tokens.source.is_spent and torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise RuntimeError(
            "stream: expected a source that can be read again, for the backward, got an iterator; give a list, a DataLoader "
            "or an array, or run the model under torch.no_grad()"
        )
    layer.seed(0, z.device)  # one for all chunks, and for their backward
    layer.freeze()
    return _Streamed.apply(layer, z.detach(), tokens, inverted, *inputs)


def _attend(layer: Any, z: Tensor, inverted: bool, tensors: tuple[Tensor, ...], part: Any) -> tuple[Tensor, Tensor]:
    tokens, mask = part
    return layer.of_tensors(*tensors)._attend(z, tokens, mask, inverted, with_lse=True)


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, z, tokens, inverted, *inputs):
        own = inputs[: len(inputs) - len(tokens.parameters)]
        found, count, dtype = None, 0, None
        for part in tokens.chunks(inputs[len(own) :]):
            out, lse = _attend(layer, z, inverted, own, part)
            dtype = out.dtype
            these, size = (in_float64(out), lse), part[0].count
            if found is not None:
                these = merge_parts(*zip(found, these), [count, size], inverted)
            found, count = these, count + size
        if found is None:
            raise ValueError("stream: expected at least one chunk, got none; give a source with tokens")
        out, lse = found[0].to(z.device, dtype), found[1]
        ctx.save_for_backward(out, lse, *inputs)
        ctx.call = layer, z, tokens, inverted
        half = torch.is_autocast_enabled(z.device.type), torch.get_autocast_dtype(z.device.type)
        ctx.mode = forced_backend(), z.device.type, *half
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_lse):
        out, lse, *inputs = ctx.saved_tensors
        layer, z, tokens, inverted = ctx.call
        needed = ctx.needs_input_grad[4:]
        d_out = d_out.to(lse.dtype)
        against = (d_out * out).sum(-1)  # what the sum of the weights takes away
        if inverted:
            total = lse.exp()
            d_out = d_out / total.clamp_min(EPS).unsqueeze(-1)
            d_weight = torch.where(total > EPS, -against / total, 0.0) + d_lse / total
        else:
            d_weight = d_lse - against
        nobody, most = lse < NOBODY, max(1, tokens.count)
        sums: list[Any] = [None] * len(inputs)
        leaves = [t.detach().requires_grad_(need) for t, need in zip(inputs, needed)]
        own = len(leaves) - len(tokens.parameters)
        at = [i for i, need in enumerate(needed) if need]
        forced, kind, casts, half = ctx.mode  # the forward's: each chunk's is run again
        # Chunks are described inside, too: they may depend on parameters.
        with torch.enable_grad(), forced_again(forced), torch.autocast(kind, dtype=half, enabled=casts):
            for part in tokens.chunks(tuple(leaves[own:])):
                o, part_lse = _attend(layer, z, inverted, tuple(leaves[:own]), part)
                if inverted:
                    weight = part_lse.exp()
                    share = weight.clamp_min(EPS)
                else:
                    share = weight = torch.where(nobody, part[0].count / most, (part_lse - lse).exp())
                moved = share.unsqueeze(-1) * o.to(share.dtype)
                results, wanted = (moved, weight), [leaves[i] for i in at]
                grads = torch.autograd.grad(results, wanted, (d_out, d_weight), allow_unused=True)
                for i, grad in zip(at, grads):
                    if grad is not None:
                        sums[i] = in_float64(grad) if sums[i] is None else sums[i] + in_float64(grad)
        return None, None, None, None, *(None if s is None else s.to(t.device, t.dtype) for s, t in zip(sums, inputs))
