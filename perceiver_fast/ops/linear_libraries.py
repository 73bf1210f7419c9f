"""The libraries that a large matrix product on the CPU can run on, and which of them is the fastest here.

Nobody's product is the fastest everywhere: the BLAS that torch was built with takes a slow path on other vendors'
processors, where oneDNN is several times as fast; on its own vendor's it is the faster one; and in bfloat16 ranks
change again. So the first large product of a process times them all on one
small problem (about a fifth of a second, once) and each kind of product goes to the fastest, to torch's own in case
of doubt. Every library computes what it is asked for: float32 products are float32 products, in the precision that
torch.set_float32_matmul_precision (by default the highest) allows.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from perceiver_fast.settings import Setting, Use

NAMES = ("auto", "torch", "onednn")
ROWS, INNER, OUTER = 256, 512, 2048  # the problem that is timed: a feed-forward of perceiver-pytorch's README
ROUNDS = 5
SECONDS = 0.5  # rounds of one kind of product end after this, on slow machines
GAIN = 1.15  # by how much another library has to be faster
KINDS = ("forward", "grad_input", "grad_weight")


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """``a [n, k] @ b [m, k]^T`` by oneDNN, any strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], None)


def _onednn_takes_bfloat16() -> bool:
    """Whether this CPU has what oneDNN's bfloat16 products need, AVX-512 or the like; elsewhere they raise."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and supported()


@dataclass(frozen=True)
class Library:
    """One library's products of contiguous ``x [n, k]``, ``weight [m, k]`` and ``d_out [n, m]``.

    ``takes`` are its dtypes.
    """

    forward: Callable[[Tensor, Tensor], Tensor] | None = None
    grad_input: Callable[[Tensor, Tensor], Tensor] | None = None
    grad_weight: Callable[[Tensor, Tensor], Tensor] | None = None
    takes: tuple[torch.dtype, ...] = (torch.float32,)

    def products(self) -> dict[str, Callable[[Tensor, Tensor], Tensor] | None]:
        """The products of a training step by their kind."""
        return dict(forward=self.forward, grad_input=self.grad_input, grad_weight=self.grad_weight)


LIBRARIES = {
    "torch": Library(
        forward=lambda x, weight: torch.nn.functional.linear(x, weight),
        grad_input=lambda d_out, weight: d_out @ weight,
        grad_weight=lambda d_out, x: d_out.T @ x,
        takes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    ),
    "onednn": Library(
        forward=onednn_product,
        grad_input=lambda d_out, weight: onednn_product(d_out, weight.T),
        grad_weight=lambda d_out, x: onednn_product(d_out.T, x.T),
        takes=(torch.float32, torch.bfloat16) if _onednn_takes_bfloat16() else (torch.float32,),
    ),
}


def reasons(name: str) -> list[str]:
    """Why a library cannot be used with this torch; empty where it can."""
    if name == "onednn":
        if not torch.backends.mkldnn.is_available():
            return ["torch was built without oneDNN"]
        if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            return ["this torch does not offer oneDNN's linear"]
    return []


def _calls(dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """By kind and library, the product of the probe."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (ROWS, INNER), (ROWS, OUTER), (OUTER, INNER)  # on the CPU, whatever the default device
    x, d_out, weight = (torch.randn(s, generator=generator, device="cpu").to(dtype) for s in shapes)
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {kind: {} for kind in KINDS}
    for name, library in LIBRARIES.items():
        if reasons(name) or dtype not in library.takes:
            continue
        if library.forward is not None:
            calls["forward"][name] = functools.partial(library.forward, x, weight)
            calls["grad_input"][name] = functools.partial(library.grad_input, d_out, weight)
            calls["grad_weight"][name] = functools.partial(library.grad_weight, d_out, x)
    return calls


def _speeds(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """GFLOP/s of every call, timed in turns; the best round of each, since other work can only slow one down."""
    best = dict.fromkeys(calls, float("inf"))
    start_of_all = time.perf_counter()
    for name in calls:
        calls[name]()
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - start_of_all > SECONDS:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2e-9 * ROWS * INNER * OUTER / seconds for name, seconds in best.items()}


def _fastest(speeds: dict[str, float], gain: float) -> str:
    """The first library, or a later one that is ``gain`` times as fast."""
    names = iter(speeds)
    best = next(names)
    for name in names:
        if speeds[name] > gain * speeds[best]:
            best = name
    return best


@functools.cache
def measure(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """GFLOP/s by kind of product (:data:`KINDS`) and library, for float32 or bfloat16 operands; timed once a process.

    Beside bfloat16's libraries, in the same minute, stands what float32 operands reach: as library "float32".
    """
    with torch.inference_mode(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        by_kind = _calls(dtype)
        if dtype == torch.bfloat16:
            for kind, calls in _calls(torch.float32).items():
                by_kind[kind]["float32"] = calls[fastest(kind, torch.float32)]
        return {kind: _speeds(calls) for kind, calls in by_kind.items()}


@functools.cache
def fastest(kind: str, dtype: torch.dtype) -> str:
    """The library that was measured to be the fastest, or one that is as good and comes before it."""
    speeds = {name: speed for name, speed in measure(dtype)[kind].items() if name in LIBRARIES}
    return _fastest(speeds, GAIN)


@functools.cache
def _float32_is_faster() -> bool:
    found = measure(torch.bfloat16)
    return statistics.geometric_mean(s["float32"] / s[fastest(k, torch.bfloat16)] for k, s in found.items()) > GAIN


class use_linear(Use):
    """Say which library runs large matrix products on the CPU, at once and, as a context manager, until a block ends.

    It holds for the thread or asyncio task that it is called in.

    Args:
        name: "auto" (measured once a process; the default), "torch" (always torch's own: results are then the same to
            the last bit from run to run on one machine), "onednn". The environment variable PERCEIVER_FAST_LINEAR sets the process's own value.

    Raises:
        ValueError: the name is unknown, or this torch lacks the library.

    Example:
        >>> import perceiver_fast as pf
        >>> with pf.use_linear("torch"):
        ...     pf.ops.linear_libraries.library_of("forward")
        'torch'
    """

    def __init__(self, name: str):
        super().__init__(_library, _check(name, "use_linear"))


def _check(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if why := reasons(name):
        raise ValueError(f"{where}: expected a library that runs here, got {name!r}: {'; '.join(why)}; take 'auto'")
    return name


def library_of(kind: str, dtype: torch.dtype = torch.float32) -> str:
    """The library that runs one kind of product, as forced or measured."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._get_mkldnn_enabled():
        return "torch"
    forced = _library.value()
    if forced == "auto":
        return fastest(kind, dtype)
    library = LIBRARIES[forced]
    has = library.products()[kind]
    return forced if has is not None and dtype in library.takes else "torch"


def linear_settings() -> tuple:
    """What :func:`library_of` depends on beside what was measured."""
    return _library.value(), torch._C._get_mkldnn_enabled()


def wide_bfloat16() -> bool:
    """Whether bfloat16 operands are multiplied in float32, exactly, since this CPU does so faster."""
    return _library.value() != "torch" and _float32_is_faster()


_library = Setting("linear", _check(os.environ.get("PERCEIVER_FAST_LINEAR") or "auto", "PERCEIVER_FAST_LINEAR"))
