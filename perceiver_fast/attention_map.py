"""Where chosen latents look: attention weights of a cross-attention layer, for those latents only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_fast.reference import grid_logits
from perceiver_fast.tokens import GridTokens


def attention_map(
    model: nn.Module, data: Tensor, layer: int = 0, latents: Sequence[int] | None = None, mask: Tensor | None = None
) -> Tensor:
    """Attention of chosen latents of one cross-attention layer over the input.

    The model runs up to that layer on its ordinary path; weights are formed for the chosen latents alone, so memory is
    that of the result, never N x M.

    Args:
        model: a :class:`perceiver_fast.Perceiver`; evaluated as in inference, whatever its mode.
        data, mask: as its forward takes them.
        layer: index of the block whose cross-attention is shown. Default: 0.
        latents: indices of the latents to show. Default: the first 8.

    Returns:
        ``[B, H, len(latents), n_1, .., n_A]``, the dtype of the computation; each map sums to one over the input.

    Raises:
        TypeError: the model is another one.
        IndexError: there is no such layer or latent.
        ValueError: the layer uses inverted attention, whose weights are not a distribution over the input alone.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> pf.attention_map(model, torch.randn(1, 6, 5, 3), latents=[0, 2]).shape
        torch.Size([1, 1, 2, 6, 5])
    """
    if not (hasattr(model, "inverted_cross_attn") and hasattr(model, "input_axis") and hasattr(model, "max_freq")):
        raise TypeError(f"attention_map: expected a perceiver_fast.Perceiver, got {type(model).__name__}")
    count = model.latents.shape[0]
    chosen = list(range(min(8, count)) if latents is None else latents)
    if not 0 <= layer < len(model.layers):
        raise IndexError(f"attention_map: expected layer in 0..{len(model.layers) - 1}, got {layer}")
    if bad := [n for n in chosen if not 0 <= n < count]:
        raise IndexError(f"attention_map: expected latents in 0..{count - 1}, got {bad}")
    if model.inverted_cross_attn[layer]:
        raise ValueError(f"attention_map: layer {layer} uses inverted attention; choose a layer that does not")

    cross_attn, captured = model.layers[layer].cross_attn, {}

    def capture(module, args, kwargs):
        # A weight-tied layer is called once per block; stop at the call of the block asked for.
        captured.setdefault("calls", []).append((args, kwargs))
        if len(captured["calls"]) == 1 + sum(block is model.layers[layer] for block in model.layers[:layer]):
            raise _Stop

    modes = {module: module.training for module in model.modules()}
    handle = cross_attn.register_forward_pre_hook(capture, with_kwargs=True)
    try:
        with torch.no_grad():
            model.eval()
            model(data, mask=mask)
    except _Stop:
        pass
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode

    (stream, tokens), kwargs = captured["calls"][-1]
    with torch.no_grad():
        x = stream.value()
        return _weights(cross_attn, cross_attn.norm(x)[:, chosen], tokens, kwargs["mask"], data)


class _Stop(Exception):
    """Everything needed was seen."""


def _weights(cross_attn: nn.Module, x: Tensor, tokens, mask: Tensor | None, data: Tensor) -> Tensor:
    batch, sizes, fn = data.shape[0], data.shape[1:-1], cross_attn.fn
    if isinstance(tokens, GridTokens):
        q, *_ = cross_attn.grid_tables(x, tokens)
        q, scale = q.flatten(1, 2).expand(batch, -1, -1), tokens.scale(cross_attn.norm_context.eps)
        logits = grid_logits(q, tokens.feat, scale).flatten(2)  # [B, H n, M]
    else:
        q = fn.split_heads(fn.to_q(x).expand(batch, -1, -1))
        k = fn.split_heads(tokens.keys_values(fn.to_kv, cross_attn.norm_context).chunk(2, dim=-1)[0])
        logits = (q @ k.transpose(-1, -2) * fn.dim_head**-0.5).flatten(1, 2)
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), -torch.finfo(logits.dtype).max)
    return logits.softmax(-1).view(batch, fn.heads, x.shape[1], *sizes)
