"""Whole models: perceiver-pytorch in the forms its users run it in, and perceiver-fast; a forward and a training step."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.sdpa import with_sdpa
from benchmarks.sides import DTYPES, OURS, Case, Level, Peer, Side, compiled, ours, parameters
from benchmarks.suite.plans import needs
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.peer import peer_model


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
