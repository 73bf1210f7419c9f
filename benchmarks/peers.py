"""The implementations of a whole model: perceiver-pytorch in the forms its users run it in, and perceiver-fast."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_io import Attention as IOAttention
from perceiver_pytorch.perceiver_pytorch import Attention
from torch import Tensor, nn

from benchmarks.families import eager
from perceiver_fast import extension
from perceiver_fast.insight.geometries import Geometry


class SDPAAttention(Attention):
    """perceiver-pytorch's attention through torch's scaled_dot_product_attention: no N x M matrix in memory.

    Same parameters, arguments and results. Inverted attention and joined queries, which that function does not have,
    stay as they were.
    """

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, inverted_attention: bool = False
    ) -> Tensor:
        if inverted_attention or self.queries_contribute_kv:
            return super().forward(x, context=context, mask=mask, inverted_attention=inverted_attention)
        keys_values = self.to_kv(x if context is None else context)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.to_q(x), *keys_values.chunk(2, dim=-1))
        )
        if mask is not None:
            mask = mask.flatten(1)
            # A row that is all masked attends uniformly, and its logits are constants: zero queries without a mask.
            empty = ~mask.any(-1, keepdim=True)
            q = q.masked_fill(empty[:, None, None], 0.0)
            mask = (mask | empty)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout.p * self.training)
        return self.to_out(out.transpose(1, 2).flatten(2))


def with_sdpa(model: nn.Module) -> nn.Module:
    """Turn every attention of this one ``model`` of perceiver-pytorch into :class:`SDPAAttention`, in place."""
    for module in model.modules():
        if type(module) in (Attention, IOAttention):
            if type(module) is IOAttention:  # perceiver-pytorch has it twice, once without these options
                module.dropout, module.queries_contribute_kv = nn.Dropout(0.0), False
            module.__class__ = SDPAAttention
    return model


def sdpa(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch with :class:`SDPAAttention`."""
    return with_sdpa(eager(geometry))


def fast(geometry: Geometry) -> nn.Module:
    """perceiver-fast, loaded with perceiver-pytorch's weights."""
    model = geometry.build()
    model.load_state_dict(eager(geometry).state_dict())
    return model


def truth(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch in float64; its attention through torch's, which builds no N x M matrix."""
    return sdpa(geometry).double()


def compiled(model: nn.Module) -> nn.Module:
    """``torch.compile`` of a peer, for the one shape it is called with."""
    return torch.compile(model, dynamic=False)


def compile_reasons() -> list[str]:
    """Why torch.compile cannot run here."""
    compiler = os.environ.get("CXX", "g++")
    return [] if shutil.which(compiler) else [f"torch.compile needs the C++ compiler {compiler}, which was not found"]


def fast_reasons() -> list[str]:
    """Why perceiver-fast's kernels cannot run here; without them its times would be plain PyTorch's."""
    return [] if extension.error is None else [extension.error]


@dataclass(frozen=True)
class Peer:
    """One implementation: how to build it for a geometry, and ``reasons() -> list[str]``, why it cannot run here."""

    build: Callable[[Geometry], nn.Module]
    reasons: Callable[[], list[str]] = list


OURS = "fast"
PEERS = {
    "eager": Peer(eager),
    "sdpa": Peer(sdpa),
    OURS: Peer(fast, fast_reasons),
    "compile": Peer(lambda geometry: compiled(sdpa(geometry)), compile_reasons),
    "compile-eager": Peer(lambda geometry: compiled(eager(geometry)), compile_reasons),
}


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in perceiver-pytorch; torch.compile prefixes them."""
    return {name.removeprefix("_orig_mod."): parameter for name, parameter in sorted(model.named_parameters())}
