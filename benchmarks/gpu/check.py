"""Whether a side computes the right thing, found out before it is timed, and the ratios that may then be stated."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import perceiver_fast as pf
from benchmarks.gpu import sides
from benchmarks.gpu.problem import Problem
from benchmarks.sides import OURS, Results, Side, errors, excess, parameters, run
from perceiver_fast.insight.peer import peer_model

# Of the output and of the worst gradient, relative in the 2-norm; tf32 in place of float32 would fail. In bf16 all sides
# are within 8e-3 and 2e-2 at a fifth of the tokens, within 1e-1 at the few of a dry run.
TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 1e-1)}
ROWS = 128  # queries whose float64 logits exist at one time


def call(problem: Problem, side: Side, inputs: tuple[Tensor, ...], cotangent: Tensor) -> Results:
    """What is timed: the output, and in a step the gradients of latents (op level) and parameters, by name."""
    return run(side, problem.case.step, problem.autocast(), inputs, (cotangent,))


def _per_element(problem: Problem) -> int:
    """How many of the results are of every batch element: the output, and at op level the latents' gradient."""
    return 2 if problem.case.level == "op" and problem.case.step else 1


def checked_results(problem: Problem, side: Side) -> Results:
    """What :func:`truth` has, of a call of ``side`` on the first inputs.

    Its cotangent is of the checked batch elements alone: the others add nothing to a gradient.
    """
    inputs, cotangent = problem.copies[0]
    kept = torch.zeros_like(cotangent)
    kept[problem.checked] = cotangent[problem.checked]
    results, rows = call(problem, side, inputs, kept), _per_element(problem)
    return (*(t[problem.checked].detach() for t in results[:rows]), *results[rows:])


def truth_name() -> str:
    """What :func:`truth` is computed by."""
    model = "perceiver-fast's reference" if sides.PEERS["eager"].absent() else "perceiver-pytorch"
    return f"float64: op level plain PyTorch on built tokens, model level {model}"


def truth(problem: Problem) -> Results:
    """Output and gradients of the checked batch elements in float64, one element at a time."""
    inputs, cotangent = problem.copies[0]
    apply, module = (_op_truth if problem.case.level == "op" else _model_truth)(problem)
    side, rows = Side(apply, parameters=parameters(module)), _per_element(problem)
    found = []
    for b in problem.checked:
        part = tuple(t[b : b + 1].detach().double().requires_grad_(t.requires_grad) for t in inputs)
        results = run(side, problem.case.step, nullcontext(), part, (cotangent[b : b + 1].double(),))
        found.append([t.detach() for t in results])
    return tuple(torch.cat(parts) if i < rows else sum(parts) for i, parts in enumerate(zip(*found)))


def _op_truth(problem: Problem):
    layer = copy.deepcopy(problem.layer).double()
    scale = problem.geometry.dim_head**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(1, 2) * scale).softmax(-1) @ v

    def apply(x: Tensor, image: Tensor) -> Tensor:
        tokens = problem.model.describe(image).materialize()
        k, v = layer.fn.to_kv(layer.norm_context(tokens)).chunk(2, dim=-1)
        q = layer.fn.to_q(layer.norm(x))
        rows = [checkpoint(attend, part, k, v, use_reentrant=False) for part in q.split(ROWS, dim=1)]
        return layer.fn.to_out(torch.cat(rows, 1))

    return apply, layer


def _model_truth(problem: Problem):
    if not sides.PEERS["eager"].absent():
        with torch.device(problem.device):
            model = peer_model(problem.geometry, problem.model.state_dict()).double()
        return model, model
    model = copy.deepcopy(problem.model).double()

    def apply(image: Tensor) -> Tensor:
        with pf.use_backend("reference"):
            return model(image)

    return apply, model


def judge(results: Results, truths: Results | None, dtype: str) -> dict:
    """Errors of a side's checked results, and whether they are within the tolerance for ``dtype``.

    Without truths nothing is known: ``agrees`` is None.
    """
    if truths is None:
        return {"relative_error": None, "gradient_error": None, "agrees": None}
    found = errors(results, truths)
    return found | {"agrees": not excess(found, TOLERANCES[dtype])}


def ratio(measured: dict[str, dict], peer: str) -> float | None:
    """Time of ``peer`` over ours; None unless both were timed and both compute the right thing."""
    theirs, ours = (measured.get(name, {}) for name in (peer, OURS))
    known = all(side.get("agrees") and side.get("median") for side in (theirs, ours))
    return theirs["median"] / ours["median"] if known else None
