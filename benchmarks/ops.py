"""What benchmarks of single ops share: sides that take the same inputs and return the same results.

An op's file says ``problem(geometry, batch)`` and is otherwise ``test_<op> = op_benchmark(..)``. The truth is the first side
on float64 inputs; a step returns the gradients of the first inputs too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.geometries import PLANS
from benchmarks.measure import Call, Case, cotangent, measure
from benchmarks.peers import OURS, compile_reasons, fast_reasons
from benchmarks.throughput import Work, counted, scaled
from perceiver_fast.insight.geometries import GEOMETRIES, Geometry

PASSES = ("forward", "step")
EAGER, COMPILE = "eager", "compile"


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    Args:
        inputs: tensors that every side takes.
        sides: peer to function of the inputs; the first is plain PyTorch and what the others are checked against.
        work: of the forward, without counts.
        wanted: of how many of the inputs, the first ones, a step returns the gradients.
    """

    inputs: tuple[Tensor, ...]
    sides: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]]
    work: Work
    wanted: int


Make = Callable[[Geometry, int], Problem]


def runner(side: Callable, inputs: tuple[Tensor, ...], pass_name: str, wanted: int) -> Call:
    """A call of ``side``; in a step it also returns the gradients of the first ``wanted`` inputs."""
    wanted = 0 if pass_name == "forward" else wanted
    inputs = tuple(t.detach().requires_grad_(i < wanted) for i, t in enumerate(inputs))

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(wanted > 0):
            outputs = side(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not wanted:
            return outputs[:1]
        cotangents = [cotangent(out) for out in outputs]
        return outputs[0], *torch.autograd.grad(outputs, inputs[:wanted], cotangents)

    return call


def build(make: Make, peer: str, pass_name: str, geometry: Geometry, batch: int) -> Call:
    """The call that is measured."""
    problem = make(geometry, batch)
    side = torch.compile(problem.sides[EAGER], dynamic=False) if peer == COMPILE else problem.sides[peer]
    return runner(side, problem.inputs, pass_name, problem.wanted)


@lru_cache(maxsize=1)
def truths(make: Make, pass_name: str, geometry: Geometry, batch: int) -> tuple[Tensor, ...]:
    """What plain PyTorch returns in float64."""
    problem = make(geometry, batch)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in problem.inputs)
    return runner(next(iter(problem.sides.values())), inputs, pass_name, problem.wanted)()


def op_benchmark(op: str, make: Make, peers: tuple[str, ...]) -> Callable:
    """The benchmark of one op: every peer, forward and step, on every geometry that has its name for a level."""

    @pytest.mark.parametrize("peer", (*peers, OURS))
    @pytest.mark.parametrize("pass_name", PASSES)
    def test_op(benchmark, geometry: str, batch: int, pass_name: str, peer: str) -> None:
        reasons = {OURS: fast_reasons, COMPILE: compile_reasons}.get(peer, list)()
        if reasons:
            pytest.skip("; ".join(reasons))
        shape = GEOMETRIES[geometry]
        work = scaled(counted_work(make(shape, batch), peer), pass_name)
        case = Case(op, geometry, pass_name, peer, batch)
        args = make, peer, pass_name, shape, batch
        measure(benchmark, case, build, args, truths(make, pass_name, shape, batch), work, PLANS[geometry].rounds)

    test_op.__name__ = f"test_{op}"
    return test_op


def counted_work(problem: Problem, peer: str) -> Work:
    """The problem's work with what ``peer`` does for a forward, by the operators it calls; compiled, none are seen."""
    if peer == COMPILE:
        return problem.work
    counts = counted(problem.sides[peer], *problem.inputs)
    return replace(problem.work, multiply_adds=counts.multiply_adds, exponentials=counts.exponentials)


def random(*size: int, seed: int = 4) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def nbytes(*tensors: Tensor) -> int:
    """Of tensors together."""
    return sum(t.nbytes for t in tensors)
