"""A trial: does a stand-in compute what a module's own forward computes, on random input?

For classes that only look like a known one. The trial is of a copy, in float64, with outputs and gradients compared; it
leaves no trace: no hook is called, no generator moved, no gradient kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.check import tensors_of
from perceiver_fast.adapters.forwards import StandIn, restore

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
AGREE = 1e-9


def trial(module: nn.Module, kind: type[StandIn], inputs: Callable[[nn.Module], list[dict]]) -> str | None:
    """What differs between a module's own forward and a stand-in of ``kind``, in words; None if nothing.

    Args:
        module: the module.
        kind: the stand-in.
        inputs: makes keywords for some calls of a module, in float64.
    """
    if any(p.device.type == "meta" for p in module.parameters()):
        return "its parameters are on no device to try it on"
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.inference_mode(False):
        torch.manual_seed(0)
        try:
            mine = restore(copy.deepcopy(module)).cpu().double().eval().requires_grad_()
            for inside in mine.modules():
                for hooks in HOOKS:
                    inside.__dict__[hooks].clear()
            for given in inputs(mine):
                wrong = _differs(mine, kind(mine), given)
                if wrong is not None:
                    return wrong
        except Exception as error:  # a stranger's forward, on our input
            return f"tried on random input, it raises {type(error).__name__}: {error}"
    return None


def _differs(module: nn.Module, stand_in: StandIn, given: dict[str, Any]) -> str | None:
    why = stand_in.why_not(**given)
    if why is not None:
        return why
    results, kinds = [], []
    for run in (module, stand_in.run):
        keywords = {k: v.clone().requires_grad_() if _learns(k, v) else v for k, v in given.items()}
        if run is module:  # forwards of PreNorm take their first argument by its place alone
            (_, first), *rest = keywords.items()
            output = run(first, **dict(rest))
        else:
            output = run(**keywords)
        outputs = list(tensors_of(output))
        kinds.append(type(output))
        weights = (torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t) for t in outputs)
        loss: Any = sum((t * weight).sum() for t, weight in zip(outputs, weights))
        loss.backward()
        leaves = [*module.parameters(), *(v for k, v in keywords.items() if _learns(k, v))]
        results.append([*outputs, *(None if t.grad is None else t.grad.clone() for t in leaves)])
        module.zero_grad(set_to_none=True)
    if kinds[0] is not kinds[1] or len(results[0]) != len(results[1]):
        return f"its forward returns {kinds[0].__name__}, which is not known"
    for a, b in zip(*results):
        if (a is None) != (b is None):
            return "tried on random input, gradients are not those of its own forward"
        if a is not None and (a.shape != b.shape or not (a - b).abs().max() <= AGREE * (1 + a.abs().max())):
            return "tried on random input, it computes something else"
    return None


def _learns(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
