"""A kernel tried once on a small call: forward and backward, in float32 and in half precision, against ground truth.

Truth is the reference in float64, on the CPU. A trial runs in a thread of its own, which has none of its caller's modes:
no autocast, no hooks of saved tensors (checkpointing counts them), no stream, no open transform, nothing forced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from perceiver_fast.backends import BackendError, use_backend
from perceiver_fast.ops.make import Same

Call = Callable[[Same, torch.dtype], object]
"""Calls an op by its public function on tensors that it makes, those of its own choice in the given dtype."""

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""By dtype, the most that a result or gradient may be off: the norm of the error, relative to that of the truth."""


@dataclass(frozen=True)
class Outcome:
    """Of a trial: what is wrong, or nothing, and whether it would be so again, on this device with these versions."""

    error: str
    lasting: bool = True


def held(call: Call, backend: str, device: torch.device) -> Outcome:
    """Whether ``backend``, forced, computes ``call`` on ``device`` as the reference does.

    Raises:
        RuntimeError: an error of earlier work on a GPU, which is nobody's here.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(_compared(call, backend, device)), name="kernel trial")
    thread.start()
    thread.join()
    return found[0] if found else Outcome("it ended early", lasting=False)


def _compared(call: Call, backend: str, device: torch.device) -> Outcome:
    refused: list[BackendError] = []
    try:
        for dtype, bound in BOUNDS.items():
            try:
                found = _results(call, backend, Same(device, tried=backend), dtype)
            except BackendError as refusal:  # kernels need not take both dtypes
                refused.append(refusal)
                if len(refused) == len(BOUNDS):
                    raise
                continue
            truth = _results(call, "reference", Same("cpu", exact=True, tried=backend), dtype)
            for number, (mine, true) in enumerate(zip(found, truth, strict=True)):
                error = _distance(mine, true)
                if not error <= bound:  # NaN is not
                    return Outcome(f"in {dtype} tensor {number} of its results and gradients is off by {error:.1e}")
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return Outcome(f"{type(error).__name__}: {first[:300]}", lasting=_lost(device))
    return Outcome("")


def _results(call: Call, backend: str, make: Same, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients by all that was made."""
    with use_backend(backend), torch.inference_mode(False), torch.enable_grad():
        outputs = [t for t in tree_leaves(call(make, dtype)) if isinstance(t, Tensor)]
        weights = [make.numbers(*t.shape, dtype=t.dtype).to(t.dtype) for t in outputs]
        grads = torch.autograd.grad(outputs, make.leaves, weights)
    return [*outputs, *grads]


def _distance(mine: Tensor, true: Tensor) -> float:
    truth = true.detach().double().cpu()
    return float((mine.detach().cpu().double() - truth).norm() / truth.norm().clamp_min(1e-30))


def _lost(device: torch.device) -> bool:
    """Whether a GPU takes nothing more from this process, as after a wrong address; else an error may have passed by."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False
