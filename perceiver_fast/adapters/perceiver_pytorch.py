"""perceiver-pytorch's ``Perceiver``: its tokens are described, not joined; blocks and layers run as its own code has them.

``PerceiverIO``, ``PerceiverLM``, blocks and the variants need nothing of their own: their layers are those of families.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.conditions import why_not_now
from perceiver_fast.adapters.described import described
from perceiver_fast.adapters.forwards import StandIn, stand_ins
from perceiver_fast.layers.fusing import is_called
from perceiver_fast.tokens.describe import describe_grid

MODULE = "perceiver_pytorch.perceiver_pytorch"


def is_perceiver(module: nn.Module) -> bool:
    """Whether a module is exactly perceiver-pytorch's ``Perceiver`` of 0.11."""
    kind = type(module)
    return kind.__module__ == MODULE and kind.__qualname__ == "Perceiver" and hasattr(module, "inverted_cross_attn")


class PerceiverForward(StandIn):
    """``Perceiver.forward`` of perceiver-pytorch 0.11."""

    kind = "model"

    def why_not(self, data: Any = None, mask: Any = None, **others: Any) -> str | None:
        module = self.module
        if not module.fourier_encode_data:
            return "its input comes with its own encoding: layers do the rest"
        if torch.compiler.is_compiling():
            return "while a graph is traced, tokens are built"
        if not isinstance(data, Tensor) or data.dim() != module.input_axis + 2 or 0 in data.shape:
            return "its input is of another kind"
        found = why_not_now(data)
        for at, block in enumerate(module.layers):
            if found is not None:
                return found
            if type(block).__module__ != MODULE or type(block).__qualname__ != "PerceiverBlock":
                return f"layers.{at} is of class {type(block).__name__}"
            found = f"layers.{at} {is_called(block)}" if is_called(block) else None
            layer = block._modules["cross_attn"]
            if found is None and (layer is None or "forward" not in stand_ins(layer)):
                found = f"layers.{at}.cross_attn is not accelerated"
            for name, inside in () if layer is None else layer.named_modules():
                if found is None and is_called(inside):
                    found = f"layers.{at}.cross_attn.{name} {is_called(inside)}"
        return found

    def run(
        self,
        data: Tensor,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Any = None,
        return_hiddens: bool = False,
    ) -> Any:
        module, batch = self.module, data.shape[0]
        tokens = describe_grid(data.contiguous(), module.num_freq_bands, float(module.max_freq))
        self.note(f"{' x '.join(map(str, data.shape[1:-1]))} {tokens.kind} of {data.shape[-1]} channels, described")
        context = described(tokens, data.dtype, data.device)
        x = module.latents.unsqueeze(0).expand(batch, -1, -1)
        keep = return_hiddens or module.has_attn_residual or block_outputs is not None
        if keep:
            given = [x] if block_outputs is None else block_outputs
            block_outputs = [given] if isinstance(given, Tensor) else list(given)
        for at, (block, residual) in enumerate(zip(module.layers, module.attn_residuals)):
            x = block(x, context=context, mask=mask, inverted_attention=module.inverted_cross_attn[at])
            if keep:
                block_outputs.append(x)
            if residual is not None:
                x = residual(block_outputs)
        out = x if return_embeddings else module.to_logits(x)
        return (out, block_outputs) if return_hiddens else out
