"""Named ranges for profilers: which layer and which op of this package the time goes to. Off by default.

Layers and ops open their ranges themselves. Hooks could not do it, since a layer with a hook is not fused
(layers/fusing.py). While ranges are off, each costs a function call and a comparison; compiled and exported graphs have
none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

F = TypeVar("F", bound=Callable)

KINDS = ("auto", "record_function", "nvtx", "off")

_kind = "off"
_open: Callable[[str], AbstractContextManager] | None = None  # opens a range; None where ranges are off
_names: Mapping[nn.Module, str] = {}


@contextmanager
def _both(name: str) -> Iterator[None]:
    """A range of both kinds."""
    with torch.profiler.record_function(name), torch.cuda.nvtx.range(name):
        yield


def _opener(kind: str, where: str) -> Callable[[str], AbstractContextManager] | None:
    """The function that opens a range of a kind; None for ``"off"``. ``where`` names the setting in messages.

    NVTX needs a torch built with CUDA, but no GPU; looking for a GPU would start the driver.
    """
    if kind not in KINDS:
        raise ValueError(f"{where}: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    cuda = torch.version.cuda is not None
    if kind == "nvtx" and not cuda:
        raise ValueError(
            f"{where}: expected a torch built with CUDA for 'nvtx', got torch {torch.__version__}; "
            "use 'record_function', which torch.profiler shows"
        )
    openers = {
        "auto": _both if cuda else torch.profiler.record_function,
        "record_function": torch.profiler.record_function,
        "nvtx": torch.cuda.nvtx.range,
        "off": None,
    }
    return openers[kind]


class ranges:
    """Turn named ranges on, at once and, used as a context manager, until the end of the block.

    A range is opened around every layer, named as in the model (``layers.0.cross_attn``), and around every op in it
    (``grid_attention``; in the backward ``grid_attention.backward``). Where one op does the work of several layers of a
    small model, they are one range, the op's. Outputs are the same to the bit. It holds for the
    whole process, all threads included; compiled and exported models have no ranges.

    Args:
        model: whose layers are named; a layer that it uses under several names (``weight_tie_layers``) has the first of
            them. Default: layers are called by their class.
        kind: ``"record_function"`` (what torch.profiler shows), ``"nvtx"`` (what nsys and ncu show; needs a torch built
            with CUDA), ``"auto"`` (both, where torch was built with CUDA; the default) or ``"off"``. The environment
            variable PERCEIVER_FAST_RANGES sets the initial value: 1 is ``auto``, 0 is ``off``.

    Raises:
        ValueError: the kind is unknown, or torch cannot do it.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> with pf.ranges(model), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ...     logits = model(torch.randn(1, 6, 6, 3))
        >>> {"layers.0.cross_attn", "grid_cross_attention"} <= {event.key for event in profile.key_averages()}
        True
    """

    def __init__(self, model: nn.Module | None = None, kind: str = "auto"):
        opener = _opener(kind, "ranges")
        names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        for name, module in () if model is None else model.named_modules():
            names[module] = name
        self._previous = _kind, _open, _names
        _set(kind, opener, names)

    def __enter__(self) -> ranges:
        return self

    def __exit__(self, *exc: object) -> None:
        _set(*self._previous)


def _set(kind: str, opener: Callable | None, names: Mapping[nn.Module, str]) -> None:
    """Set the process's kind of ranges, what opens one, and the names of layers."""
    global _kind, _open, _names
    _kind, _open, _names = kind, opener, names


def ranges_kind() -> str:
    """The kind of ranges that is on, or ``"off"``."""
    return _kind


def open_range(name: str) -> AbstractContextManager:
    """A range of this name around the block, for code that no compiler sees; nothing where ranges are off."""
    return nullcontext() if _open is None else _open(name)


OPS: set[str] = set()
"""Names that :func:`op_range` has given."""


def op_range(name: str) -> Callable[[F], F]:
    """Decorate a function: its calls are ranges of this name."""
    OPS.add(name)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args, **keywords):
            if torch.compiler.is_compiling() or _open is None:  # first, so that no graph is guarded by _open
                return function(*args, **keywords)
            with _open(name):
                return function(*args, **keywords)

        return cast(F, run)

    return decorate


def layer_range(forward: F) -> F:
    """Decorate a module's forward: its calls are ranges of the name that the module has in the model, or its class."""

    @functools.wraps(forward)
    def run(self, *args, **keywords):
        if torch.compiler.is_compiling() or _open is None:
            return forward(self, *args, **keywords)
        with _open(_names.get(self) or type(self).__name__):
            return forward(self, *args, **keywords)

    return cast(F, run)


def _initial(value: str) -> str:
    """The kind that a value of PERCEIVER_FAST_RANGES stands for."""
    return {"": "off", "0": "off", "1": "auto"}.get(value, value)


_kind = _initial(os.environ.get("PERCEIVER_FAST_RANGES", ""))
_open = _opener(_kind, "PERCEIVER_FAST_RANGES")
