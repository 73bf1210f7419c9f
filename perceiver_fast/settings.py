"""A setting with a value for the process, which a thread or an asyncio task can override for itself for a while."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class Setting:
    """A named value: the last one that this thread or task has forced and not released, else that of the process.

    Forced values can be released in any order, so that overlapping blocks (of generators, of tasks) leave nothing behind.

    Args:
        name: for people.
        initial: the value of the process, for threads and tasks that force none.

    Example:
        >>> from perceiver_fast.settings import Setting
        >>> colour = Setting("colour", "red")
        >>> first, second = colour.force("green"), colour.force("blue")
        >>> colour.release(first)
        >>> colour.value()
        'blue'
        >>> colour.release(second)
        >>> colour.value()
        'red'
    """

    def __init__(self, name: str, initial: str):
        self.initial = initial
        self.forced = ""  # all values forced in the process; compiled graphs are guarded by this string
        self._here: ContextVar[tuple] = ContextVar(name, default=())
        self._everywhere: list[_Forced] = []

        def constant() -> str:
            return self._value()

        # Dynamo, which cannot trace a ContextVar, then calls the function while it traces, and takes its result.
        setattr(constant, "_dynamo_marked_constant", True)
        self._constant = constant

    def value(self) -> str:
        """The value that holds in this thread or task.

        Compiled graphs are compiled again when values are forced or released. But threads that force different values
        at the same time share one graph.
        """
        if not self.forced:
            return self.initial
        return self._constant() if torch.compiler.is_compiling() else self._value()

    def force(self, value: str) -> _Forced:
        """Let ``value`` hold in this thread or task until the returned object is given to :meth:`release`."""
        forced = _Forced(value)
        self._here.set((*self._here.get(), forced))
        self._everywhere.append(forced)
        self._sum_up()
        return forced

    def release(self, forced: _Forced) -> None:
        """End a forced value, and the bare ones (forced without a block of their own) that were forced here after it.

        Args:
            forced: what :meth:`force` returned. In another thread or task, it alone ends.
        """
        here = self._here.get()
        since = here[here.index(forced) :] if forced in here else ()
        for ended in (forced, *(other for other in since if other.bare)):
            ended.holds = False
        self._here.set(tuple(other for other in here if other.holds))
        self._everywhere = [other for other in self._everywhere if other.holds]
        self._sum_up()

    def _value(self) -> str:
        """The value that holds in this thread or task, for eager code."""
        for forced in reversed(self._here.get()):
            if forced.holds:
                return forced.value
        return self.initial

    def _sum_up(self) -> None:
        """Write all forced values of the process into one string."""
        self.forced = ", ".join(forced.value for forced in self._everywhere)


class _Forced:
    """A forced value; whether it still holds; and whether it is bare, forced without a block that would end it."""

    def __init__(self, value: str):
        self.value, self.holds, self.bare = value, True, False


class Use:
    """Base class of what forces a value of a setting at once and, used as a context manager, until the end of the block.

    Without a block of its own the value ends with the block around it, if there is one.

    Args:
        setting: what is set.
        value: a value of it.
    """

    def __init__(self, setting: Setting, value: str):
        self._setting, self._forced = setting, setting.force(value)
        self._forced.bare = True

    def __enter__(self) -> Self:
        self._forced.bare = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._setting.release(self._forced)
