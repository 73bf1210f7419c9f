"""Repeated blocks of a model as one line each: ``layers.{0..7}.self_attns.{0..5}.0``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Folded(NamedTuple):
    """A name that stands for several, and the items that it stands for."""

    name: str
    items: list


def fold(items: Sequence[T], name: Callable[[T], str], key: Callable[[T], Hashable]) -> list[Folded]:
    """Fold items whose dotted names differ in an index alone.

    Neighbours in an enumeration are folded when they consist of the same: the same names further down, and equal keys.

    Args:
        items: in the order in which they are shown.
        name: of an item.
        key: what has to be equal.

    Returns:
        In the same order; with all items, each once.

    Example:
        >>> from perceiver_fast.insight.fold import fold
        >>> [line.name for line in fold(["a.0.x", "a.0.y", "a.1.x", "a.1.y", "b"], name=str, key=lambda item: 1)]
        ['a.{0..1}.x', 'a.{0..1}.y', 'b']
    """
    return _fold([Folded(name(item), [item]) for item in items], key)


def _fold(lines: list[Folded], key: Callable[[T], Hashable]) -> list[Folded]:
    children: dict[str, list[Folded]] = {}
    for line in lines:
        head, _, rest = line.name.partition(".")
        children.setdefault(head, []).append(Folded(rest, line.items))
    inner = {head: _fold(below, key) if any(line.name for line in below) else below for head, below in children.items()}

    def signature(head: str) -> tuple:
        return tuple((line.name, len(line.items), key(line.items[0])) for line in inner[head])

    folded = []
    # An index is compared with its place, so that only what is enumerated without a gap comes together.
    places = [(head, int(head) - place if head.isdecimal() else head) for place, head in enumerate(inner)]
    for _, run in groupby(places, lambda found: (found[1], signature(found[0]))):
        heads = [head for head, _ in run]
        label = heads[0] if len(heads) == 1 else f"{{{heads[0]}..{heads[-1]}}}"
        for same in zip(*(inner[head] for head in heads)):
            rest = f".{same[0].name}" if same[0].name else ""
            folded.append(Folded(label + rest, [item for line in same for item in line.items]))
    return folded
