"""The torch.library namespace ``perceiver_fast``: schemas live here in Python, kernels in the extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from perceiver_fast import extension
from perceiver_fast.gpu import INTERPRETED, architecture, triton_error


class Definitions:
    """The namespace's schemas, fake kernels and Python kernels: once a process.

    What is defined is torch's and outlives the modules of this package: those that are imported again find it there.
    """

    def __init__(self):
        namespace = vars(torch.ops.perceiver_fast)
        self._library = None
        if "defined_by" not in namespace:
            self._library = namespace["defined_by"] = torch.library.Library("perceiver_fast", "DEF")

    def define(self, schema: str) -> None:
        """Define an operator by its schema, without the namespace; or find that the C++ library did.

        Raises:
            ImportError: it did, but differently, since it was built from other sources.
        """
        if self._library is None:
            return
        there = getattr(torch.ops.perceiver_fast, schema.partition("(")[0], None)
        if there is None:
            self._library.define(schema)
        elif there.default._schema != torch._C.parse_schema(f"perceiver_fast::{schema}"):
            raise ImportError(
                f"perceiver_fast: expected the operator {schema}, got {there.default._schema} from the compiled library, "
                f"which is of other sources than this package; build it again: `{extension.mend()}`"
            )

    def impl(self, operator: str, kernel: Callable, key: str, allow_override: bool = False) -> None:
        """Let ``kernel`` run an operator on tensors of a dispatch key."""
        if self._library is not None:
            self._library.impl(operator, kernel, key, allow_override=allow_override)

    def fake(self, operator: str) -> Callable[[Callable], Callable]:
        """Decorate what gives an operator's outputs without content."""

        def register(kernel: Callable) -> Callable:
            if self._library is not None:
                torch.library.register_fake(f"perceiver_fast::{operator}", kernel, lib=self._library)
            return kernel

        return register


library = Definitions()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels compute in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Tensors of floating point in ``dtype``, those of whole numbers as they are: what a kernel is given of half precision."""
    return [t if t.dtype is dtype or not t.is_floating_point() else t.to(dtype) for t in tensors]


def narrowed(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """A kernel's results in the dtype of what it was called with."""
    return [t if t.dtype is dtype else t.to(dtype) for t in tensors]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast asks for on ``device``, or None when it is off."""
    if not torch._C._is_any_autocast_enabled():  # the usual case, in a third of the time
        return None
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def projected_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a product with a parameter: autocast's, where it is on; but autocast leaves float64 alone."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(weight.device) or weight.dtype


def unless_autocast(device: torch.device) -> AbstractContextManager:
    """Where autocast is on, it is off inside; entering torch.autocast costs as much as a small kernel."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def half_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The half-precision dtype that GPU kernels multiply in: autocast's, or ``dtype`` itself; None where there is none.

    Autocast leaves float64 alone. On CPUs no operand is rounded for a kernel's sake.
    """
    if dtype == torch.float64 or (device.type == "cpu" and not INTERPRETED):
        return None
    dtype = autocast_dtype(device) or dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def kernel_reasons(
    error: str | None, kind: str, device: torch.device, dtype: torch.dtype, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> list[str]:
    """Why compiled kernels cannot run a call: they are not there (``error``), or it is of another device or dtype."""
    reasons = [] if error is None else [error]
    if error is not None and error is extension.error and device.type == kind == "cpu":
        extension.warn_missing()
    if device.type != kind:
        reasons.append(f"it runs on {kind} tensors, not {device.type}")
    if dtype not in dtypes:
        *some, last = (str(d).removeprefix("torch.") for d in dtypes)
        reasons.append(f"it takes {', '.join(some)} and {last}, not {dtype}")
    return reasons


def cpu_error(error: str | None) -> str | None:
    """Why the C++ kernels of an op that Triton has too are not there."""
    return "TRITON_INTERPRET=1 puts the interpreted Triton kernels in their place" if INTERPRETED else error


def triton_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why Triton's kernels cannot run a call on ``device`` in ``dtype``."""
    half_or_float = (torch.float32, torch.bfloat16, torch.float16)
    reasons = kernel_reasons(triton_error, "cpu" if INTERPRETED else "cuda", device, dtype, half_or_float)
    if architecture(device) < 80:
        reasons.append(f"it is compiled for sm_80 and newer, not sm_{architecture(device)}")
    return reasons


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for: without one, an op is called without its autograd function."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def dropout_seed(probability: float, device: torch.device) -> Tensor | None:
    """A fresh seed from torch's generator, int64 of one element; None without dropout."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device) if probability > 0 else None


def seed_from(seed: Tensor | None, first: int) -> Tensor | None:
    """A seed for some of the tokens: with the index of the first of them as a second element, unless that is zero."""
    return seed if seed is None or first == 0 else torch.cat([seed, torch.full_like(seed, first)])
