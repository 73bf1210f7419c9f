"""A word that can be forced: for the thread or asyncio task that forces it, until it takes that back."""

from __future__ import annotations

from contextvars import ContextVar

import torch


class Setting:
    """The value that holds here: the last one forced in this thread or task and not taken back, else the process's own.

    Values forced are taken back in any order: what overlaps (generators, tasks) leaves nothing behind.

    Args:
        name: for people.
        initial: the value of threads and tasks that force none.

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
        self.forced = ""  # what is forced anywhere in the process: compiled graphs are guarded by it
        self._here: ContextVar[tuple] = ContextVar(name, default=())
        self._everywhere: list[_Forced] = []

        def constant() -> str:
            return self._value()

        constant._dynamo_marked_constant = (
            True  # asked while a graph is traced: compilers cannot look into a ContextVar
        )
        self._constant = constant

    def value(self) -> str:
        """The value that holds in this thread or task.

        What was compiled is compiled anew when values are forced or taken back; but threads that force different values
        at one time share it.
        """
        if not self.forced:
            return self.initial
        return self._constant() if torch.compiler.is_compiling() else self._value()

    def force(self, value: str) -> _Forced:
        """Let ``value`` hold here, until what is returned is released."""
        forced = _Forced(value)
        self._here.set((*self._here.get(), forced))
        self._everywhere.append(forced)
        self._sum_up()
        return forced

    def release(self, forced: _Forced) -> None:
        """Take back what :meth:`force` returned, and what was forced since, here, without a block of its own.

        In another thread or task than that it only ends to hold there.
        """
        here = self._here.get()
        since = here[here.index(forced) :] if forced in here else ()
        for ended in (forced, *(other for other in since if other.bare)):
            ended.holds = False
        self._here.set(tuple(other for other in here if other.holds))
        self._everywhere = [other for other in self._everywhere if other.holds]
        self._sum_up()

    def _value(self) -> str:
        for forced in reversed(self._here.get()):
            if forced.holds:
                return forced.value
        return self.initial

    def _sum_up(self) -> None:
        self.forced = ", ".join(forced.value for forced in self._everywhere)


class _Forced:
    """One value that was forced, whether it still holds, and whether it was forced without a block of its own."""

    def __init__(self, value: str):
        self.value, self.holds, self.bare = value, True, False
