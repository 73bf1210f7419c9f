"""Parameters rounded to autocast's dtype: once a call where layers stand in several places.

torch's autocast rounds a parameter at its first use and keeps the result until autocast ends. The products here run with
autocast off, so they would round it at every use; a model of shared layers keeps what was rounded as long as it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from perceiver_fast.ops.derivatives import transformed
from perceiver_fast.ops.library import autocast_dtype
from perceiver_fast.tracing import intercepted

# Numbers of parameters that are kept rounded in inference on a CPU: in memory that this process keeps (memory.py).
MOST_KEPT = 3 * 2**23

# What was rounded in the present call, beside the parameter and its content then; None outside of rounding_once.
_kept: ContextVar[dict[tuple, tuple[Tensor, Tensor, tuple]] | None] = ContextVar("kept", default=None)


@contextmanager
def rounding_once(
    device: torch.device, shared: bool = True, parameters: Callable[[], Iterable[Tensor]] = tuple
) -> Iterator[None]:
    """Inside, :func:`rounded` rounds a parameter once. Nothing is kept without autocast or its cache, or where a graph is made.

    Neither much in inference on a CPU: the pages of what is kept would take the system as long to clear as rounding takes
    (imagenet-lucid, AMD EPYC: 2.6 s a forward either way, and 150 MB more). In training they would be saved in any case.

    Args:
        device: of the parameters.
        shared: whether some layer stands in several places; if none does, nothing is kept. Default: True.
        parameters: them. Default: few.
    """
    plain = not shared or torch.compiler.is_compiling() or autocast_dtype(device) is None
    if not plain and device.type == "cpu" and not torch.is_grad_enabled():
        plain = sum(p.numel() for p in parameters()) > MOST_KEPT
    if plain or not torch.is_autocast_cache_enabled() or intercepted() or transformed() or _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight.to(dtype)``; inside :func:`rounding_once` the same tensor for every use of a parameter.

    As with torch's autocast, that is only done of parameters that learn, and gradients of all their uses then add up in
    ``dtype``. A parameter that was written to since, or is now used with gradients where it was not, is rounded again;
    what is written through ``.data`` is not seen, as torch's does not see it.

    Example:
        >>> import torch
        >>> from perceiver_fast.ops.rounding import rounded, rounding_once
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> with torch.autocast("cpu", torch.bfloat16), rounding_once(weight.device):
        ...     print(rounded(weight, torch.bfloat16) is rounded(weight, torch.bfloat16))
        True
    """
    if weight.dtype == dtype:
        return weight
    kept = None if torch.compiler.is_compiling() else _kept.get()
    if kept is None or type(weight) is not nn.Parameter or not weight.requires_grad or weight.is_inference():
        return weight.to(dtype)
    key = id(weight), dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    content = weight._version, weight.data_ptr()
    found = kept.get(key)
    if found is None or found[2] != content:
        kept[key] = found = weight.to(dtype), weight, content
    return found[0]
