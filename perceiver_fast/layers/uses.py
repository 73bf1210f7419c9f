"""Layers that stand in several places of a model: the gradients of their parameters, added up by the op that makes them.

autograd would add up what every place finds, one parameter after the other, each on all threads. Instead an op returns its
parameters, too, and the next place takes these: what a later place found is there when an earlier one's backward runs, which
adds to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

L = TypeVar("L")


class Uses:
    """The layers of one call of a model, and what the next place takes of those that stand in several."""

    def __init__(self) -> None:
        # By the identities of parameters: these themselves, what they were then, and what a place returned.
        self._next: dict[tuple[int, ...], tuple[Sequence[Tensor], list[tuple], Sequence[Tensor]]] = {}
        self._again = False

    def of(self, layers: Sequence[L]) -> Iterator[L]:
        """The layers one after the other; while one is run, :meth:`again` says whether it stands in a later place."""
        left = Counter(map(id, layers))
        for layer in layers:
            left[id(layer)] -= 1
            self._again = left[id(layer)] > 0
            yield layer
        self._again = False

    @property
    def again(self) -> bool:
        """Whether the layer that runs now stands in a later place, too."""
        return self._again

    def take(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """What an op takes in the place of ``parameters``: what an earlier place returned, or these if they were changed."""
        found = self._next.get(tuple(map(id, parameters)))
        return parameters if found is None or found[1] != _content(parameters) else found[2]

    def keep(self, parameters: Sequence[Tensor], returned: Sequence[Tensor]) -> None:
        """Let the next place of ``parameters`` take what this one ``returned``."""
        if returned is parameters:  # nothing learns
            return
        self._next[tuple(map(id, parameters))] = parameters, _content(parameters), returned


def _content(parameters: Sequence[Tensor]) -> list[tuple]:
    """What changes where parameters are written to, get other memory, or begin or cease to learn."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version, p.requires_grad) for p in parameters]


_uses: ContextVar[Uses | None] = ContextVar("uses", default=None)


def uses() -> Uses | None:
    """The layers of the call of a model that goes on; None where gradients need not be added up."""
    return _uses.get()


@contextmanager
def several_uses(shared: bool) -> Iterator[Uses]:
    """Inside, :func:`uses` are those of a call of a model.

    Args:
        shared: whether some layer stands in several places, and what each makes reaches the next with its gradient; if not,
            there are none.
    """
    found = Uses()
    if not shared or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        yield found
        return
    token = _uses.set(found)
    try:
        yield found
    finally:
        _uses.reset(token)
