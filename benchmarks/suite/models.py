"""Whole models: perceiver-pytorch in the forms its users run it in, and perceiver-fast; a forward and a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from perceiver_pytorch.perceiver_io import Attention as IOAttention
from perceiver_pytorch.perceiver_pytorch import Attention
from torch import Tensor, nn

from benchmarks.sides import DTYPES, OURS, Case, Level, Peer, Side, compiled, ours, parameters
from benchmarks.suite.plans import needs
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.peer import peer_model


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


def eager(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch as it is, with the weights that all peers share."""
    torch.manual_seed(0)
    return peer_model(geometry)


def sdpa(geometry: Geometry) -> nn.Module:
    """perceiver-pytorch, its attention through torch's: no N x M matrix in memory."""
    return with_sdpa(eager(geometry))


def fast(geometry: Geometry) -> nn.Module:
    """perceiver-fast, loaded with perceiver-pytorch's weights."""
    model = geometry.build()
    model.load_state_dict(eager(geometry).state_dict())
    return model


def _side(model: nn.Module, case: Case) -> Side:
    return Side(model.train(case.step), (case.geometry.input(case.batch),), parameters(model))


def truth(case: Case) -> Side:
    """perceiver-pytorch in float64; its attention through torch's, which builds no N x M matrix."""
    model = sdpa(case.geometry).double()
    return Side(model, (case.geometry.input(case.batch).double(),), parameters(model))


PEERS = {
    "eager": Peer(lambda case: _side(eager(case.geometry), case)),
    "sdpa": Peer(lambda case: _side(sdpa(case.geometry), case)),
    OURS: ours(lambda case: _side(fast(case.geometry), case)),
    "compile": compiled(lambda case: _side(sdpa(case.geometry), case)),
    "compile-eager": compiled(lambda case: _side(eager(case.geometry), case)),
}
LEVEL = Level(PEERS, truth, lambda geometry: geometry.cross_attentions, op=False, needs=needs, dtypes=DTYPES)
