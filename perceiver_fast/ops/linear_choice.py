"""Which library a large product runs on: as forced, or as compared once a process.

A comparison is made when it is first needed, of the kind of product that is needed: what only infers compares forward
products alone. Where it was not settled, since the machine was busy or the libraries too close to be told apart, the
same probe runs again during later large products, twice at most, and its timings join the first ones.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from perceiver_fast.ops.linear_libraries import KINDS, LIBRARIES, NAMES, reasons
from perceiver_fast.ops.linear_prior import avx512, multiplies_bfloat16, prior_of, prior_of_bfloat16, vendor, versions
from perceiver_fast.ops.linear_probe import probe
from perceiver_fast.ops.linear_verdict import Prior, Runs, Verdict, decide
from perceiver_fast.settings import Setting, Use

LOOKS = (10.0, 100.0)  # seconds after which what was not settled is looked at again
BFLOAT16 = "bfloat16"  # the comparison of bfloat16's products with float32's; others are called by their kind
COMPARISONS = (*KINDS, BFLOAT16)


class use_linear(Use):
    """Say which library runs large matrix products on the CPU, at once and, as a context manager, until a block ends.

    It holds for the thread or asyncio task that it is called in.

    Args:
        name: "auto" (measured once a process; the default), "torch" (always torch's own: results are then the same to
            the last bit from run to run on one machine), "onednn". Those two measure nothing. The environment variable
            PERCEIVER_FAST_LINEAR sets the process's own value.

    Raises:
        ValueError: the name is unknown, or this torch lacks the library.

    Example:
        >>> import perceiver_fast as pf
        >>> with pf.use_linear("torch"):
        ...     pf.ops.linear_choice.library_of("forward")
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


def forced_library() -> str:
    """Name of the library that is forced in this thread or asyncio task, or ``"auto"``."""
    return _library.value()


def library_of(kind: str, dtype: torch.dtype = torch.float32) -> str:
    """The library that runs one kind of product, as forced or compared."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._get_mkldnn_enabled():
        return "torch"
    forced = forced_library()
    if forced == "auto":  # torch's own products of bfloat16 are oneDNN's, where oneDNN has any
        return verdict(kind).chosen if dtype == torch.float32 else "torch"
    library = LIBRARIES[forced]
    has = library.products()[kind]
    return forced if has is not None and dtype in library.takes else "torch"


def wide_bfloat16() -> bool:
    """Whether bfloat16 operands are multiplied in float32, exactly, since this CPU does so faster."""
    return forced_library() != "torch" and float32_is_faster()


def float32_is_faster() -> bool:
    """Whether float32's forward products are faster than bfloat16's, with the operands' conversion and back."""
    return verdict(BFLOAT16).chosen == "float32"


def why_torch() -> list[str]:
    """Why torch's own products are taken without a comparison; empty where there is one."""
    if why := reasons("onednn"):
        return why
    return [] if torch.backends.mkl.is_available() else ["torch was built without MKL; of its BLAS nothing is known"]


@dataclass
class _Comparison:
    """What was found of one comparison: timings, the decision, and after how many seconds it is looked at again."""

    runs: Runs = field(default_factory=dict)
    verdict: Verdict | None = None
    looks: list[float] = field(default_factory=list)
    measured: float = 0.0

    def due(self) -> bool:
        """Whether it has to be measured, for the first time or again."""
        if self.verdict is None:
            return True
        return bool(self.looks) and time.monotonic() - self.measured > self.looks[0]

    def measure(self, name: str) -> None:
        """Measure, decide, and say when to look again."""
        calls, kind, dtype, prior = _compared(name)
        if self.verdict is None:
            # bfloat16's decides the dtype of what is saved between passes, which must not change.
            self.looks = [] if name == BFLOAT16 else list(LOOKS)
        else:
            self.looks.pop(0)
        probe(calls, kind, dtype, prior, self.runs)
        self.verdict, self.measured = decide(self.runs, prior), time.monotonic()
        if self.verdict.settled:
            self.looks = []


def _compared(name: str) -> tuple[dict, str, torch.dtype, Prior]:
    """The products of a comparison, the kind and dtype of their operands, and what is known of them."""
    if name == BFLOAT16:
        wide: Any = LIBRARIES[library_of("forward")].forward
        calls = {
            "bfloat16": LIBRARIES["torch"].forward,
            "float32": lambda x, weight: wide(x.float(), weight.float()).bfloat16(),
        }
        return calls, "forward", torch.bfloat16, prior_of_bfloat16(multiplies_bfloat16())
    calls = {library: LIBRARIES[library].products()[name] for library in ("torch", "onednn")}
    return calls, name, torch.float32, prior_of(name, vendor(), versions(), avx512())


_comparisons: dict[str, _Comparison] = {name: _Comparison() for name in COMPARISONS}
_lock = threading.RLock()  # of measuring; bfloat16's comparison needs float32's


def _unlock_in_child() -> None:
    """A forked process has what was found, and must not wait for a thread that it does not have."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def verdict(name: str) -> Verdict:
    """What one of :data:`COMPARISONS` came to, measured if it has to be.

    Threads that ask at once wait for one measurement; while it is looked at again they take what is known.
    """
    if name != BFLOAT16 and (why := _why_torch()):
        return Verdict("torch", why, True, True, {})
    comparison = _comparisons[name]
    if comparison.due() and _lock.acquire(blocking=comparison.verdict is None):
        try:
            if comparison.due():
                comparison.measure(name)
        finally:
            _lock.release()
    known: Any = comparison.verdict  # it is measured by now
    return known


@functools.cache
def _why_torch() -> str:
    return "; ".join(why_torch())


_library = Setting("linear", _check(os.environ.get("PERCEIVER_FAST_LINEAR") or "auto", "PERCEIVER_FAST_LINEAR"))
