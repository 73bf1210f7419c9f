"""Whole models: perceiver-pytorch in the forms its users run it in, and perceiver-fast; a forward and a training step."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import nn

from benchmarks.sdpa import with_sdpa
from benchmarks.sides import OURS, Case, Peer, Side, compiled, ours, parameters
from benchmarks.suite.level import DTYPES, Level
from benchmarks.suite.plans import eager_bytes, truth_bytes
from benchmarks.suite.throughput import Work, module_work
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


@lru_cache(maxsize=2)
def _work(is_ours: bool, pass_name: str, geometry: Geometry, batch: int) -> Work:
    model = geometry.build() if is_ours else eager(geometry)
    return module_work(geometry, batch, pass_name, model, geometry.cross_attentions, geometry.input(batch))


def work(case: Case) -> Work:
    """What one call of our model, or of perceiver-pytorch's, amounts to."""
    return _work(case.peer == OURS, case.pass_name, case.geometry, case.batch)


def needs(case: Case) -> dict[str, int]:
    """Memory that the check and the model take, in bytes."""
    found = {"the check against float64": truth_bytes(case.geometry, case.batch)}
    if "eager" in case.peer:
        found["perceiver-pytorch"] = eager_bytes(case.geometry, case.batch)
    return found


PEERS = {
    "eager": Peer(lambda case: _side(eager(case.geometry), case)),
    "sdpa": Peer(lambda case: _side(sdpa(case.geometry), case)),
    OURS: ours(lambda case: _side(fast(case.geometry), case)),
    "compile": compiled(lambda case: _side(sdpa(case.geometry), case)),
    "compile-eager": compiled(lambda case: _side(eager(case.geometry), case)),
}
LEVEL = Level(PEERS, truth, work, needs, dtypes=DTYPES)
