"""The op: grid attention in C++ and in plain PyTorch, and dense attention that is given its keys and values.

The passes are the forward, a step (forward, and backward to the queries, as in training on fixed inputs) and a step
with the gradients of the tokens too.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

import pytest
from torch import Tensor

from benchmarks.geometries import PLANS, logits_bytes
from benchmarks.grid_sides import Problem, Side, dense_side, grid_side, problem
from benchmarks.measure import Call, Case, measure, need_memory
from benchmarks.peers import OURS, fast_reasons
from benchmarks.throughput import Work, scaled
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

LEVEL = "grid_attention"
PASSES = ("forward", "step", "step+tokens")
PEERS = ("reference", "sdpa", OURS)
REFERENCE_MATRICES = {"forward": 5, "step": 10, "step+tokens": 10}  # N x M matrices the reference holds at its peak


@lru_cache(maxsize=1)
def shared_problem(geometry: Geometry, batch: int) -> Problem:
    """Built once for all passes and peers of a geometry."""
    return problem(geometry, batch)


@lru_cache(maxsize=1)
def truths(pass_name: str, geometry: Geometry, batch: int) -> tuple[Tensor, ...]:
    """torch's own attention in float64, which shares no code with the op."""
    p = shared_problem(geometry, batch)
    tensors = {f.name: getattr(p, f.name) for f in fields(p) if isinstance(getattr(p, f.name), Tensor)}
    side = dense_side(replace(p, **{name: t.double() for name, t in tensors.items()}), pass_name)
    return side.common(side.call())


def side_of(peer: str, pass_name: str, geometry: Geometry, batch: int) -> Side:
    """One side of the comparison."""
    p = shared_problem(geometry, batch)
    if peer == "sdpa":
        return dense_side(p, pass_name)
    return grid_side(p, pass_name, "cpu" if peer == OURS else "reference")


def build(*case) -> Call:
    """The call that is measured."""
    return side_of(*case).call


def work_of(peer: str, pass_name: str, geometry: Geometry, batch: int) -> Work:
    """Of one call; torch is given keys and values."""
    head = geometry.model.get("cross_dim_head", 64)
    pairs = batch * geometry.queries * geometry.tokens
    each = 2 * head if peer == "sdpa" else 2 * geometry.channels + len(geometry.sizes)
    data = 4 * batch * geometry.tokens * (2 * head if peer == "sdpa" else geometry.channels + 1)
    return scaled(Work(batch, batch * geometry.tokens, pairs, data, float(pairs * each), pairs), pass_name)


# The first of these varies fastest: the peers of one geometry and pass run one after the other.
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("pass_name", PASSES)
def test_grid_attention(benchmark, geometry: str, batch: int, pass_name: str, peer: str) -> None:
    if peer == OURS and (reasons := fast_reasons()):
        pytest.skip("; ".join(reasons))
    shape = GEOMETRIES[geometry]
    if peer == "reference":
        need_memory("the reference", REFERENCE_MATRICES[pass_name] * logits_bytes(shape, batch))
    args = peer, pass_name, shape, batch
    expected = truths(pass_name, shape, batch)
    case = Case(LEVEL, geometry, pass_name, peer, batch)
    common = side_of(*args).common
    measure(benchmark, case, build, args, expected, work_of(*args), PLANS[geometry].rounds, common)
