"""The comparison of an accelerated model with the original one, on an example: outputs and every gradient."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from perceiver_fast.adapters.forwards import StandIn, all_stand_ins, install, restore, stand_ins
from perceiver_fast.adapters.report import Check, Row
from perceiver_fast.tracing import PLAIN

SMALL = 2e7  # parameters and numbers of an example: what is more is compared in its own dtype, without gradients
OUTPUTS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GRADIENTS = 1e-8  # of float64, over the parameter's largest
NOISE = 1e-11  # over the largest gradient of all: gradients that are zero but for rounding


@dataclass
class Result:
    """Outputs of a model, and gradients by its parameters."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of floating point in what a model returns, however it is packed."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_of(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)
    elif is_dataclass(value):
        yield from tensors_of(vars(value))


def arguments_of(example: Any) -> tuple[tuple, dict]:
    """``example`` as arguments of a call: a mapping's are keywords, a tuple's or list's are not."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def run(model: nn.Module, args: tuple, kwargs: dict, gradients: bool) -> Result:
    """One forward, and the gradients of a fixed random weighting of all outputs."""
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
        torch.manual_seed(0)
        outputs = list(tensors_of(model(*args, **kwargs)))
        loss: Any = 0.0  # a tensor, where there is an output with a gradient
        for at, output in enumerate(outputs):
            if gradients and output.requires_grad:
                generator = torch.Generator().manual_seed(at)
                weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
                loss = loss + (output * weight).sum()
        if isinstance(loss, Tensor):
            loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Result([output.detach() for output in outputs], {name: grad.clone() for name, grad in found.items()})


def compare(expected: Result, actual: Result, dtype: torch.dtype) -> tuple[float, float | None, str | None]:
    """Errors of outputs and of gradients, and what is wrong, in words, or None."""
    shapes = [[tuple(t.shape) for t in result.outputs] for result in (expected, actual)]
    if shapes[0] != shapes[1]:
        return float("inf"), None, f"outputs are of shapes {shapes[1]}, not {shapes[0]}"
    error = 0.0
    for a, b in zip(expected.outputs, actual.outputs):
        if a.numel():
            relative = (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-300)
            same = torch.equal(a, b)
            error = max(error, 0.0 if same else float("inf") if relative.isnan() else relative.item())
    wrong = None if error <= OUTPUTS[dtype] else f"outputs differ by {error:.1e}"
    if not expected.gradients and not actual.gradients:
        return error, None, wrong
    if set(expected.gradients) != set(actual.gradients):
        names = sorted(set(expected.gradients) ^ set(actual.gradients))
        return error, float("inf"), wrong or f"gradients of {', '.join(names[:3])} are there in one of both alone"
    worst, most = 0.0, max(float(g.abs().max()) for g in expected.gradients.values())
    for name, a in expected.gradients.items():
        difference, largest = (a - actual.gradients[name]).abs().max().item(), a.abs().max().item()
        if difference > GRADIENTS * largest + NOISE * most or difference != difference:
            wrong = wrong or f"the gradient of {name} differs by {difference / max(largest, 1e-300):.1e}"
        if largest > 1e-6 * most:
            worst = max(worst, difference / largest)
    return error, worst, wrong


def check(model: nn.Module, example: Any) -> tuple[Check, list[Row]]:
    """Compare ``model`` with the original on ``example``, and put back what differs.

    Both are copies in evaluation mode, in float64 where they are small; else in their own dtype and without gradients.

    Args:
        model: a model that was accelerated.
        example: what it is called with: a tensor, a tuple of arguments, or a dict of keywords.

    Returns:
        What was found, and a row for every module that was put back.
    """
    args, kwargs = own = arguments_of(example)
    original, fast = restore(copy.deepcopy(model)).eval(), copy.deepcopy(model).eval()
    with torch.no_grad():
        original(*args, **kwargs)  # an example that the original does not take raises as it would
    untouched = original
    numbers = sum(p.numel() for p in model.parameters())
    sizes: list[int] = []
    tree_map_only(Tensor, lambda t: sizes.append(t.numel()), (args, kwargs))
    small = numbers <= SMALL and sum(sizes) <= SMALL / 100
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    doubled = _doubled(original, fast) if small else None
    small = doubled is not None
    if doubled is not None:
        dtype, (original, fast) = torch.float64, doubled
        args, kwargs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs))
    expected = run(original, args, kwargs, small)
    output, gradient, wrong = _tried(expected, fast, args, kwargs, small, dtype)
    back: list[Row] = []
    if wrong is not None:
        back = _put_back(model, fast, expected, args, kwargs, small, dtype)
        output, gradient, wrong = _tried(expected, fast, args, kwargs, small, dtype)
        if wrong is not None:  # nothing alone, but something together
            for name, stand_in in [*all_stand_ins(model)]:
                back.append(Row(name, stand_in.what(), why=f"put back: with others, {wrong}"))
            restore(model)
            output, gradient, _ = _tried(expected, restore(fast), args, kwargs, small, dtype)
    del fast
    left = copy.deepcopy(model).eval()
    seconds = _times(untouched, left, *own)
    for name, stand_in in all_stand_ins(left):
        _copy_notes(stand_in, stand_ins(model.get_submodule(name))[stand_in.method])
    note = None if small else "It is large, or its weights cannot be float64: gradients were not compared"
    return Check(str(dtype).removeprefix("torch."), output, gradient, seconds, note), back


def _raises(call: Callable[[], object]) -> str | None:
    """What a call raises, in words; None if nothing."""
    try:
        call()
    except Exception as error:  # whatever a stand-in of a family that only looked like one does
        return f"it raises {type(error).__name__}: {error}"
    return None


def _tried(
    expected: Result, fast: nn.Module, args: tuple, kwargs: dict, small: bool, dtype: torch.dtype
) -> tuple[float, float | None, str | None]:
    """:func:`compare` of a run of ``fast``; one that raises is wrong by what it raises."""
    found: list[Result] = []
    wrong = _raises(lambda: found.append(run(fast, args, kwargs, small)))
    return compare(expected, found[0], dtype) if wrong is None else (float("inf"), None, wrong)


def _doubled(*models: nn.Module) -> tuple[nn.Module, ...] | None:
    """The models in float64; None where that cannot be, as of quantized weights."""
    try:
        found = tuple(copy.deepcopy(model).double() for model in models)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):
        return None
    floating = [t for model in found for t in model.parameters() if t.is_floating_point()]
    plain = all(type(t) in PLAIN and t.dtype == torch.float64 for t in floating)
    return found if plain else None


def _times(original: nn.Module, fast: nn.Module, args: tuple, kwargs: dict) -> tuple[float, float]:
    """Seconds of one forward of both, the lesser of two runs in turns."""
    best = [float("inf"), float("inf")]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(2):
            for at, model in enumerate((original, fast)):
                began = time.perf_counter()
                outputs = list(tensors_of(model(*args, **kwargs)))
                if outputs and outputs[0].is_cuda:
                    torch.cuda.synchronize()
                best[at] = min(best[at], time.perf_counter() - began)
    return best[0], best[1]


def _copy_notes(source: StandIn, target: StandIn) -> None:
    target.way, target.why, target.work = source.way, source.why, source.work


def _put_back(
    model: nn.Module, fast: nn.Module, expected: Result, args: tuple, kwargs: dict, small: bool, dtype: torch.dtype
) -> list[Row]:
    """Try every stand-in alone, and take off both models those that make a difference."""
    kinds = [(name, type(stand_in), stand_in.method) for name, stand_in in all_stand_ins(fast)]
    back = []
    good = []
    for name, kind, method in kinds:
        restore(fast)
        module = fast.get_submodule(name)
        install(kind(module))
        wrong = _tried(expected, fast, args, kwargs, small, dtype)[2]
        if wrong is None:
            good.append((name, kind))
            continue
        mine = model.get_submodule(name)
        back.append(Row(name, stand_ins(mine)[method].what(), why=f"put back: {wrong}"))
        object.__delattr__(mine, method)
    restore(fast)
    for name, kind in good:
        install(kind(fast.get_submodule(name)))
    return back
