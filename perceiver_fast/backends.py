"""Which implementation of an op runs, and why not the others.

Every op keeps an ordered list of backends. A backend answers a call with the list of reasons why it cannot run
it; an empty list means it can. The same list drives dispatch, error messages, ``explain`` and ``info``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from perceiver_fast.settings import Setting, Use

NAMES = ("auto", "cpu", "triton", "cuda", "reference")


class BackendError(RuntimeError):
    """A forced backend cannot run the call; the message lists its reasons."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: its name and ``reasons(call) -> list[str]``, why it cannot run a call."""

    name: str
    reasons: Callable[[Any], list[str]]


@dataclass(frozen=True)
class Choice:
    """The backend chosen for a call, and for every backend tried before it why it was passed over."""

    op: str
    backend: str | None
    rejected: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{self.op}[{self.backend}]"
        if self.rejected:
            text += "; " + "; ".join(f"not {name}: {', '.join(why)}" for name, why in self.rejected.items())
        return text


def choose(op: str, backends: tuple[Backend, ...], call: object) -> Choice:
    """The first of ``backends`` that can run ``call``, or the forced one; ``backend`` is None when there is none."""
    rejected: dict[str, list[str]] = {}
    forced = forced_backend()
    for backend in backends:
        if forced not in ("auto", backend.name):
            rejected[backend.name] = [f"backend {forced!r} is forced"]
            continue
        reasons = backend.reasons(call)
        if not reasons:
            return Choice(op, backend.name, rejected)
        rejected[backend.name] = reasons
    if forced != "auto":
        rejected.setdefault(forced, [f"{op} has no backend of that name"])
    return Choice(op, None, rejected)


def require(*choices: Choice) -> Choice:
    """The first of ``choices``, ways to do one thing, that has a backend.

    Raises:
        BackendError: none has; the message lists the reasons of the forced backend, or of all of them.
    """
    for choice in choices:
        if choice.backend is not None:
            return choice
    forced = forced_backend()
    reasons = [
        f"{choice.op}[{name}]: {', '.join(why)}"
        for choice in choices
        for name, why in choice.rejected.items()
        if forced in ("auto", name)
    ]
    if forced == "auto":
        raise BackendError(f"no backend can run this call: {'; '.join(reasons)}")
    raise BackendError(
        f"backend {forced!r} was forced but cannot run this call: {'; '.join(reasons)}. "
        "Use perceiver_fast.use_backend('auto') to let one be chosen."
    )


def forced_backend() -> str:
    """Name of the backend that is forced in this thread or asyncio task, or ``"auto"``."""
    return _backend.value()


def _check(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


class use_backend(Use):
    """Force a backend for every op, at once and, used as a context manager, until the end of the block.

    It holds for the thread or asyncio task that it is called in; others have the process's own: nn.DataParallel's
    workers, and on GPUs the backward's thread, where torch.utils.checkpoint computes again (a model's ``checkpoint=`` brings
    it along).

    Args:
        name: ``"auto"`` (the best that can run each call; the default), ``"cpu"`` (the C++ kernels),
            ``"triton"`` (the Triton kernels of the ops that have them, on GPUs),
            ``"cuda"`` (the CUDA kernels of ``fourier_projection``, and of ``grid_attention`` in half precision) or ``"reference"`` (plain PyTorch). The
            environment variable PERCEIVER_FAST_BACKEND sets the process's own value.

    Raises:
        ValueError: the name is unknown. A forced backend that cannot run a call raises :class:`BackendError` there.

    Example:
        >>> import perceiver_fast as pf
        >>> with pf.use_backend("reference"):
        ...     pf.backends.forced_backend()
        'reference'
        >>> pf.backends.forced_backend()
        'auto'
    """

    def __init__(self, name: str):
        super().__init__(_backend, _check(name, "use_backend"))


def forced_again(name: str) -> AbstractContextManager:
    """Within, what was forced in a forward is forced in its backward, which GPUs run in a thread of their own.

    Nothing is where ``name`` is "auto", nor while torch.compile traces.
    """
    return nullcontext() if name == "auto" or torch.compiler.is_compiling() else use_backend(name)


_backend = Setting("backend", _check(os.environ.get("PERCEIVER_FAST_BACKEND") or "auto", "PERCEIVER_FAST_BACKEND"))
