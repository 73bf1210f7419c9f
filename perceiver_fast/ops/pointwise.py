"""What ops have in common that pass over activations once, as geglu and layer_norm do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perceiver_fast import extension
from perceiver_fast.backends import Backend, forced_backend
from perceiver_fast.ops.declaration import Op
from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.library import cpu_error, kernel_reasons, triton_reasons
from perceiver_fast.ops.proof import untimely

CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class PointwiseCall:
    """What the choice of a backend may depend on: dtype of the operands, and their device."""

    dtype: torch.dtype
    device: torch.device


POINTWISE_BACKENDS = (
    Backend("cpu", lambda c: kernel_reasons(cpu_error(extension.error), "cpu", c.device, c.dtype, CPU_DTYPES)),
    Backend("triton", lambda c: triton_reasons(c.device, c.dtype)),
    Backend("reference", lambda c: []),
)

_answers: dict[tuple, bool] = {}


def runs_kernel(op: Op, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel runs a pass over activations, rather than plain PyTorch.

    Under torch.compile it is plain PyTorch, and under torch.func's transforms. Answers are remembered: finding one anew
    takes as long as a small kernel.

    Raises:
        perceiver_fast.backends.BackendError: a forced backend cannot run the call.
    """
    if torch.compiler.is_compiling():
        op.require(PointwiseCall(dtype, device))
        return False
    if transformed():
        return False
    key = op.name, dtype, device, forced_backend()
    if key not in _answers:
        answer = op.require(PointwiseCall(dtype, device)) != "reference"
        if untimely(device):
            return answer
        _answers[key] = answer
    return _answers[key]
