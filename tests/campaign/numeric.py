"""Random models against float64: outputs and every gradient, of parameters and of inputs, in training and inference.

The truth is perceiver-pytorch in float64, positions and all, with a LayerNorm and a GELU that keep digits where torch's
lose them (truth.py); for what it does not have, tokens at points of the gated and mixing variants, this package's
reference; for groups of tokens, plain PyTorch on joined tokens. The yardstick is the same in the dtype that is tested.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from .judge import FLOAT64_BOUND, Judge, Results, size_of
from .models import PLAIN as PLAIN_MODEL
from .models import Built, build, draw_model
from .outcome import Outcome
from .rounding import rounded_softmax
from .truth import right_in_float64

PLAIN = PLAIN_MODEL


def draw(seed: int) -> dict:
    """A random model, its input, and how it runs."""
    r = random.Random(seed)
    case = dict(seed=seed, dtype=r.choice(["float32"] * 4 + ["bfloat16"]), threads=r.choice([1, 1, 1, 2, 3]))
    return case | draw_model(r) | dict(checkpoint=r.random() < 0.1)


def differentiable_inputs(inputs: dict, dtype: torch.dtype) -> tuple[dict, dict[str, Tensor]]:
    """Inputs in a dtype, positions at least in float32, and by name all that have a gradient."""
    flat, spec = tree_flatten_with_path(inputs)
    leaves, values = {}, []
    for path, value in flat:
        name = "".join(str(key) for key in path)
        if isinstance(value, Tensor) and value.is_floating_point():
            coords = "coords" in name or name.endswith("][1]")
            to = torch.promote_types(dtype, torch.float32) if coords else dtype
            value = leaves[name] = value.to(to, copy=True).requires_grad_()
        values.append(value)
    return tree_unflatten(values, spec), leaves


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype in a block."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def run_model(call: Callable, model: torch.nn.Module, inputs: dict, dtype: torch.dtype) -> Results:
    """Outputs in training and in inference, and the gradients of a weighted sum of them."""
    model.zero_grad()
    model.to(dtype)
    given, leaves = differentiable_inputs(inputs, dtype)
    with default_dtype(dtype):  # perceiver-pytorch's positions have it
        out = call(model, **given)
        with torch.no_grad():
            again = call(model, **given)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight.to(dtype)).sum().backward()
    found = {"output": out.detach(), "output in inference": again}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"input {name}": t.grad for name, t in leaves.items() if t.grad is not None}


def scales(built: Built) -> dict[str, float]:
    """What a gradient is multiplied with so that those of small and of huge numbers compare: at least one."""
    _, leaves = differentiable_inputs(built.inputs, torch.float32)
    tensors = dict(built.ours.named_parameters()) | {f"input {name}": t for name, t in leaves.items()}
    return {name: max(1.0, size_of(t.detach()) / max(1, t.numel()) ** 0.5) for name, t in tensors.items()}


def nudge(model: torch.nn.Module, dtype: torch.dtype, seed: int) -> None:
    """Move every weight by at most one rounding of ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.double().parameters():
            p.mul_(1 + torch.finfo(dtype).eps * (torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5))


def run(case: dict) -> Outcome:
    """Compare ours in float64 and in the case's dtype with the truth."""
    outcome, built = Outcome(), build(case, case["seed"])
    if hasattr(built.ours, "checkpoint"):
        built.ours.checkpoint = case["checkpoint"]
    compare(case, built, outcome)
    outcome.counts[f"{case['family']} models"] += 1
    return outcome


def compare(case: dict, built: Built, outcome: Outcome, bound: float = FLOAT64_BOUND, low: bool = True) -> None:
    """Judge our model.

    Args:
        case: says the dtype and the number of threads.
        built: both models and their inputs.
        outcome: gets what is found.
        bound: of errors in float64.
        low: compare in the case's dtype, too.
    """
    dtype = getattr(torch, case["dtype"])
    torch.set_num_threads(case["threads"])

    def plainly(dtype: torch.dtype, seed: int | None = None) -> Results:
        plain = copy.deepcopy(built.plain)
        if seed is None:
            return run_model(built.run_plain, plain, built.inputs, dtype)
        nudge(plain, dtype, seed)
        with rounded_softmax(seed):
            return run_model(built.run_plain, plain, built.inputs, dtype)

    with right_in_float64():
        truth = plainly(torch.float64)
    judge = Judge(outcome, truth, scales(built), plainly, bound)
    judge.float64(run_model(built.run, built.ours, built.inputs, torch.float64))
    if low:
        judge.low(run_model(built.run, built.ours, built.inputs, dtype), plainly(dtype), dtype)
