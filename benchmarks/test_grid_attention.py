"""The op: grid attention in C++ and in plain PyTorch, and dense attention that is given its keys and values.

The passes are the forward, a step (forward, and backward to the queries, as in training on fixed inputs) and a step
with the gradients of the tokens too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
from torch import Tensor

from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.grid_sides import Problem, Side, dense_side, grid_side, problem
from benchmarks.measure import errors, measure, need_memory
from benchmarks.memory import memory_method, peak_memory
from perceiver_fast import extension

LEVEL = "op"
PASSES = ("forward", "step", "step+tokens")
PEERS = ("reference", "sdpa", "fast")
REFERENCE_MATRICES = {"forward": 5, "step": 10, "step+tokens": 10}  # N x M matrices the reference holds at its peak


@lru_cache(maxsize=1)
def shared_problem(geometry: Geometry) -> Problem:
    """Built once for all passes and peers of a geometry."""
    return problem(geometry)


@lru_cache(maxsize=1)
def truth(pass_name: str, geometry: Geometry) -> tuple[Tensor, ...]:
    """torch's own result, which shares no code with the op."""
    side = dense_side(shared_problem(geometry), pass_name)
    return side.common(side.call())


def build(peer: str, pass_name: str, geometry: Geometry) -> Side:
    """One side of the comparison."""
    p = shared_problem(geometry)
    if peer == "sdpa":
        return dense_side(p, pass_name)
    return grid_side(p, pass_name, "cpu" if peer == "fast" else "reference")


def build_call(*case) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is measured."""
    return build(*case).call


# The first of these varies fastest: the peers of one geometry and pass run one after the other.
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_grid_attention(benchmark, geometry: str, pass_name: str, peer: str) -> None:
    if peer == "fast" and extension.error is not None:
        pytest.skip(extension.error)
    shape = GEOMETRIES[geometry]
    if peer == "reference":
        need_memory("the reference", REFERENCE_MATRICES[pass_name] * shape.logits_bytes)
    truths = truth(pass_name, shape)
    case = peer, pass_name, shape
    side = build(*case)
    found = errors(side.common(side.call()), truths)
    memory = {"peak_memory_bytes": peak_memory(build_call, *case), "peak_memory_method": memory_method()}
    info = {"level": LEVEL, "geometry": geometry, "pass": pass_name, "peer": peer, "tokens": shape.tokens}
    measure(benchmark, side.call, shape.rounds, **info, **found, **memory)
