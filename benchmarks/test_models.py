"""Whole models: a forward pass and a training step (forward and backward) of every peer on every geometry.

Both in float32, and the forward under autocast to bfloat16, too.
"""

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


def forward_bf16(model: nn.Module, data: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """:func:`forward` under autocast."""
    plain = forward(model, data)

    def call() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return plain()

    return call


PASSES = {"forward": forward, "step": step, "forward-bf16": forward_bf16}


def dtype_of(pass_name: str) -> str:
    """The dtype that a pass computes in."""
    return "bfloat16" if pass_name.endswith("bf16") else "float32"


def build(peer: str, pass_name: str, geometry: Geometry) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is measured: ``pass_name`` of the model of ``peer``."""
    model = PEERS[peer].build(geometry).train(pass_name == "step")
    return PASSES[pass_name](model, geometry.input())


@lru_cache(maxsize=1)
def truth(pass_name: str, geometry: Geometry) -> tuple[Tensor, ...]:
    """What perceiver-pytorch returns, in float32."""
    return PASSES[pass_name.removesuffix("-bf16")](eager(geometry), geometry.input())()


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
    found = errors(call(), truths, dtype_of(pass_name))
    memory = {"peak_memory_bytes": peak_memory(build, peer, pass_name, shape), "peak_memory_method": memory_method()}
    info = {"level": LEVEL, "geometry": geometry, "pass": pass_name, "peer": peer, "tokens": shape.tokens}
    info["dtype"] = dtype_of(pass_name)
    measure(benchmark, call, shape.rounds, **info, **found, **memory)
