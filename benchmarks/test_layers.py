"""One cross-attention layer, from latents and raw input to its output, in every library that has one."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from benchmarks.geometries import LEAN, PLANS, eager_bytes, truth_bytes
from benchmarks.layers import NOT_A_PEER, PEERS, latents, named, truth
from benchmarks.measure import Call, Case, cotangent, measure, need_memory
from benchmarks.peers import OURS
from benchmarks.throughput import Work, module_work
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

LEVEL = "layer"
PASSES = ("forward", "step")
DTYPES = ("float32", "bfloat16")


def run(
    module: nn.Module, inputs: tuple[Tensor, Tensor], geometry: Geometry, pass_name: str, dtype: str
) -> tuple[Tensor, ...]:
    """The output, then after a step the gradients of the latents and of perceiver-pytorch's parameters by their names."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    x, data = inputs
    if pass_name == "forward":
        with torch.no_grad(), autocast:
            return (module(x, data),)
    x = x.detach().requires_grad_()
    with autocast:
        out = module(x, data)
    own = {name.removeprefix("_orig_mod."): parameter for name, parameter in module.named_parameters()}
    grads = torch.autograd.grad(out, (x, *own.values()), cotangent(out))
    by_name = dict(zip(own, grads[1:], strict=True))
    return out, grads[0], *(parameter(by_name.__getitem__) for parameter in named(module, geometry).values())


def build(peer: str, pass_name: str, dtype: str, geometry: Geometry, batch: int) -> Call:
    """The call that is measured."""
    module, inputs = PEERS[peer].build(geometry), (latents(geometry, batch), geometry.input(batch))
    return lambda: run(module, inputs, geometry, pass_name, dtype)


def fits(geometry: str, peer: str) -> bool:
    """Whether a peer is to be measured on a geometry."""
    return PEERS[peer].fits(GEOMETRIES[geometry])


@lru_cache(maxsize=1)
def truths(pass_name: str, geometry: Geometry, batch: int) -> tuple[Tensor, ...]:
    """What perceiver-pytorch returns in float64."""
    inputs = latents(geometry, batch).double(), geometry.input(batch).double()
    return run(truth(geometry), inputs, geometry, pass_name, "float64")


@lru_cache(maxsize=3)
def work(peer: str, pass_name: str, geometry: Geometry, batch: int) -> Work:
    """What one call of a peer amounts to; libraries do what perceiver-pytorch does."""
    module = PEERS[peer if peer in (OURS, NOT_A_PEER) else "eager"].build(geometry)
    return module_work(geometry, batch, pass_name, module, 1, latents(geometry, batch), geometry.input(batch))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pass_name", PASSES)
def test_layer(benchmark, geometry: str, batch: int, pass_name: str, dtype: str, peer: str) -> None:
    shape = GEOMETRIES[geometry]
    if reasons := PEERS[peer].reasons():
        pytest.skip("; ".join(reasons))
    need_memory("the check against float64", truth_bytes(shape, batch))
    if peer not in (OURS, *LEAN):
        need_memory("perceiver-pytorch", eager_bytes(shape, batch, layers=1))
    case = Case(LEVEL, geometry, pass_name, peer, batch, dtype)
    args = peer, pass_name, dtype, shape, batch
    counted = work(peer, pass_name, shape, batch)
    measure(benchmark, case, build, args, truths(pass_name, shape, batch), counted, PLANS[geometry].rounds)
