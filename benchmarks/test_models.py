"""Whole models: a forward pass and a training step (forward and backward) of every peer on every geometry."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.families import eager
from benchmarks.geometries import LEAN, PLANS, eager_bytes, truth_bytes
from benchmarks.measure import Call, Case, cotangent, measure, need_memory
from benchmarks.peers import OURS, PEERS, parameters, truth
from benchmarks.throughput import Work, module_work
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

LEVEL = "model"
PASSES = ("forward", "step")
DTYPES = ("float32", "bfloat16")  # bfloat16: autocast, of float32 weights


def run(model: nn.Module, data: Tensor, pass_name: str, dtype: str) -> tuple[Tensor, ...]:
    """The output, then after a step the gradient of every parameter that has one, in the order of their names."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    if pass_name == "forward":
        with torch.no_grad(), autocast:
            return (model(data),)
    with autocast:
        out = model(data)
    grads = torch.autograd.grad(out, tuple(parameters(model).values()), cotangent(out), allow_unused=True)
    return out, *(grad for grad in grads if grad is not None)  # PerceiverIO without queries has an idle decoder


def build(peer: str, pass_name: str, dtype: str, geometry: Geometry, batch: int) -> Call:
    """The call that is measured: ``pass_name`` of the model of ``peer``."""
    model, data = PEERS[peer].build(geometry).train(pass_name == "step"), geometry.input(batch)
    return lambda: run(model, data, pass_name, dtype)


@lru_cache(maxsize=1)
def truths(pass_name: str, geometry: Geometry, batch: int) -> tuple[Tensor, ...]:
    """What perceiver-pytorch returns in float64."""
    return run(truth(geometry), geometry.input(batch).double(), pass_name, "float64")


@lru_cache(maxsize=2)
def work(ours: bool, pass_name: str, geometry: Geometry, batch: int) -> Work:
    """What one call of our model, or of perceiver-pytorch's, amounts to."""
    model = geometry.build() if ours else eager(geometry)
    return module_work(geometry, batch, pass_name, model, geometry.cross_attentions, geometry.input(batch))


# The first of these varies fastest: the peers of one geometry, pass and dtype run one after the other.
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pass_name", PASSES)
def test_model(benchmark, geometry: str, batch: int, pass_name: str, dtype: str, peer: str) -> None:
    if reasons := PEERS[peer].reasons():
        pytest.skip("; ".join(reasons))
    shape = GEOMETRIES[geometry]
    need_memory("the check against float64", truth_bytes(shape, batch))
    if peer not in (OURS, *LEAN):
        need_memory("perceiver-pytorch", eager_bytes(shape, batch))
    case = Case(LEVEL, geometry, pass_name, peer, batch, dtype)
    args = peer, pass_name, dtype, shape, batch
    counted = work(peer == OURS, pass_name, shape, batch)
    measure(benchmark, case, build, args, truths(pass_name, shape, batch), counted, PLANS[geometry].rounds)
