"""Whole models: a forward pass and a training step (forward and backward) of every peer on every geometry."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.measure import errors, measure, need_memory
from benchmarks.memory import memory_method, peak_memory
from benchmarks.peers import PEERS, eager, parameters

LEVEL = "model"


def forward(model: nn.Module, data: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the output."""

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(data),)

    return call


def step(model: nn.Module, data: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call that returns the output, then the gradient of every parameter it has, in the order of their names."""
    wanted = tuple(parameters(model).values())

    def call() -> tuple[Tensor, ...]:
        out = model(data)
        cotangent = torch.linspace(-1.0, 1.0, out.numel()).view(out.shape)
        grads = torch.autograd.grad(out, wanted, cotangent, allow_unused=True)
        return out, *(grad for grad in grads if grad is not None)  # PerceiverIO without queries has an idle decoder

    return call


PASSES = {"forward": forward, "step": step}


def build(peer: str, pass_name: str, geometry: Geometry) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is measured: ``pass_name`` of the model of ``peer``."""
    model = PEERS[peer].build(geometry).train(pass_name == "step")
    return PASSES[pass_name](model, geometry.input())


@lru_cache(maxsize=1)
def truth(pass_name: str, geometry: Geometry) -> tuple[Tensor, ...]:
    """What perceiver-pytorch returns."""
    return PASSES[pass_name](eager(geometry), geometry.input())()


# The first of these varies fastest: the peers of one geometry and pass run one after the other.
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_model(benchmark, geometry: str, pass_name: str, peer: str) -> None:
    reasons = PEERS[peer].reasons()
    if reasons:
        pytest.skip("; ".join(reasons))
    shape = GEOMETRIES[geometry]
    need_memory("the check against perceiver-pytorch", shape.eager_bytes)
    truths = truth(pass_name, shape)
    call = build(peer, pass_name, shape)
    found = errors(call(), truths)
    memory = {"peak_memory_bytes": peak_memory(build, peer, pass_name, shape), "peak_memory_method": memory_method()}
    info = {"level": LEVEL, "geometry": geometry, "pass": pass_name, "peer": peer, "tokens": shape.tokens}
    measure(benchmark, call, shape.rounds, **info, **found, **memory)
