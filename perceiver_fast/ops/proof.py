"""Which GPU kernels have yet to prove themselves on a device, and what became of it.

A kernel that no committed result covers on a GPU's architecture is tried once there (:mod:`perceiver_fast.ops.trial`) before
it is chosen. That it held is remembered on disk; a kernel that did not is unable to run on that device, with the reason,
and whatever is next takes over. Forced backends are not tried.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import warnings
from importlib import metadata
from pathlib import Path

import torch

from perceiver_fast import remembered
from perceiver_fast.backends import Backend, forced_backend
from perceiver_fast.gpu import architecture, assuming
from perceiver_fast.ops.trial import Call, held
from perceiver_fast.tracing import intercepted
from perceiver_fast.version import __version__

PROVEN: dict[str, frozenset[int]] = {}
"""By op, the architectures (90 for sm_90) on which committed results (benchmarks/results) show its kernels right: none yet."""

KERNELS = ("triton", "cuda")  # backends that are tried
TRUSTED = os.environ.get("PERCEIVER_FAST_TRUST_KERNELS") == "1"

_calls: dict[str, Call] = {}
_doubts: dict[tuple[str, str, torch.device], str] = {}
_one_at_a_time = threading.Lock()
_warned = False


def proved(op: str, backend: Backend, call: Call | None) -> Backend:
    """``backend``, unable to run what it could on a device where a trial, ``call``, failed."""
    if backend.name not in KERNELS or call is None:
        return backend
    _calls[op] = call

    def reasons(asked) -> list[str]:
        found = backend.reasons(asked)
        if found:
            return found
        why = doubt(op, backend.name, asked.device)
        return [why] if why else []

    return Backend(backend.name, reasons)


def doubt(op: str, backend: str, device: torch.device) -> str:
    """Why an op's kernels are not to be used on a device: the first call has them tried; "" for nothing."""
    known = _doubts.get((op, backend, device))
    if known == "" or forced_backend() != "auto":
        return ""
    return _settle(op, backend, device) if known is None else known


# What torch.compiler.assume_constant_result sets; that function imports torch._dynamo, which takes seconds.
setattr(doubt, "_dynamo_marked_constant", True)


def unproven(op: str, device: torch.device) -> str | None:
    """The architecture of a GPU on which an op's kernels have yet to prove themselves; None where there is no such GPU."""
    if TRUSTED or device.type != "cuda" or not torch.cuda.is_available():
        return None
    number = architecture(device)
    return None if number in PROVEN.get(op, ()) else f"sm_{number}"


def untimely(device: torch.device) -> bool:
    """Whether nothing can be tried now: GPUs are assumed, operators are watched or traced, a graph is captured, or a
    backward runs, whose thread would wait for the trial, and the trial's backward for that thread.

    Answers are then provisional: what is remembered, or trust.
    """
    if assuming() or intercepted() or torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
        return True
    if torch._guards.TracingContext.try_get() is not None:
        return True
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _settle(op: str, backend: str, device: torch.device) -> str:
    if assuming():
        return ""
    where = unproven(op, device)
    if where is None:
        _doubts[op, backend, device] = ""
        return ""
    if device.type == "cuda" and device.index is None:
        return doubt(op, backend, torch.device("cuda", torch.cuda.current_device()))
    of = {"op": op, "backend": backend, "architecture": where}
    of |= {"perceiver_fast": __version__, "torch": str(torch.__version__), "triton": _triton_version()}
    of["sources"] = _sources()
    if untimely(device):
        return remembered.recall(of) or ""
    with _one_at_a_time:
        if (op, backend, device) not in _doubts:
            error = remembered.recall(of)
            if error is None:
                error = _tried(op, backend, device, of)
            if error:
                _warn(op, backend, where, error)
            _doubts[op, backend, device] = error
    return _doubts[op, backend, device]


def _tried(op: str, backend: str, device: torch.device, of: dict[str, str]) -> str:
    outcome = held(_calls[op], backend, device)
    error = f"its check failed on {of['architecture']}: {outcome.error}" if outcome.error else ""
    if error and outcome.lasting:
        error += f" (remembered: delete {remembered.file(of)} to have it checked again)"
    if outcome.lasting:
        remembered.remember(of, error)
    return error


@functools.cache
def _sources() -> str:
    """A digest of the kernels, Triton's and CUDA's: what is changed is tried again."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    kernels = package / "kernels"
    if not kernels.exists():  # where the package is installed in place they are beside it
        kernels = package.parent / "kernels"
    for file in (*sorted(kernels.glob("*.py")), *sorted(kernels.glob("*.json")), package / "_cuda.so"):
        if file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _warn(op: str, backend: str, where: str, error: str) -> None:
    """Once a process."""
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"perceiver_fast: the {backend} kernels of {op} are not used on this GPU ({where}): {error}. What PyTorch has runs "
        "in their place, and results are right. Please report this to the perceiver-fast project, with what "
        "`python -m perceiver_fast info` prints, which names all such kernels",
        RuntimeWarning,
        stacklevel=2,
    )
