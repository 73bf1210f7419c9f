"""The torch.library namespace ``perceiver_fast``: schemas live here in Python, kernels in the extension."""

from __future__ import annotations

import torch
from torch import Tensor

library = torch.library.Library("perceiver_fast", "DEF")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels compute in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on ``device``, or None when it is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernel_reasons(
    error: str | None, kind: str, device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> list[str]:
    """Why compiled kernels cannot run a call: they are not there (``error``), or it is of another device or dtype."""
    reasons = [] if error is None else [error]
    if device.type != kind:
        reasons.append(f"it runs on {kind} tensors, not {device.type}")
    if dtype not in dtypes:
        *some, last = (str(d).removeprefix("torch.") for d in dtypes)
        reasons.append(f"it takes {', '.join(some)} and {last}, not {dtype}")
    return reasons


def dropout_seed(probability: float, device: torch.device) -> Tensor | None:
    """A fresh seed from torch's generator, int64 of one element; None without dropout."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if probability > 0 else None
