"""What ``explain`` found: the way of every layer, and its counted work beside perceiver-pytorch's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from perceiver_fast.backends import Choice
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.work import Counted, total
from perceiver_fast.layers.plan import Plan
from perceiver_fast.ops.work import Work

T = TypeVar("T")


@dataclass(frozen=True)
class LayerPath:
    """One layer: its name in the model, the way taken, the op and backend that run it, and what it counts.

    Args:
        layer: its name; of groups of tokens with the group's number.
        plan: the way taken and what runs on it; the other ways that were open, with their work; and
            the ops that describe the tokens on this way.
        operators: every operator that runs, in order, with its counts.
        original: what perceiver-pytorch counts for the same layer.
    """

    layer: str
    plan: Plan
    operators: tuple[Counted, ...] = ()
    original: Work = field(default_factory=Work)

    @property
    def choice(self) -> Choice:
        """Op and backend, and why other ways and backends were passed over."""
        return self.plan.choice

    @property
    def path(self) -> str:
        """Of a cross-attention, the way; else empty."""
        return self.plan.path

    @property
    def counts(self) -> Work:
        """What the layer counts, of the whole batch."""
        return total(self.operators)

    def seconds(self, roofs: Roofs) -> float:
        """Predicted time at the CPU's roofs: its operators run one after the other."""
        return sum(operator.counts.seconds(roofs) for operator in self.operators)

    def to_dict(self) -> dict:
        """All of it, as JSON can hold it."""
        return {
            "layer": self.layer,
            **asdict(self.choice),
            "path": self.path,
            "uses": [asdict(use) for use in self.plan.uses],
            **asdict(self.counts),
            "perceiver_pytorch": asdict(self.original),
            "operators": [{"name": operator.name, **asdict(operator.counts)} for operator in self.operators],
        }


class Layers:
    """Several layers, ``rows``, and what they count together."""

    if TYPE_CHECKING:  # a subclass has a field or a property of this name

        @property
        def rows(self) -> tuple[LayerPath, ...]: ...

    @property
    def counts(self) -> Work:
        """What they count in one forward."""
        return sum((path.counts for path in self.rows), Work())

    @property
    def original(self) -> Work:
        """What perceiver-pytorch counts for them in one forward."""
        return sum((path.original for path in self.rows), Work())

    def seconds(self, roofs: Roofs) -> float:
        """Predicted time of one forward at the CPU's roofs."""
        return sum(path.seconds(roofs) for path in self.rows)


def amount(found: LayerPath | Layers, roofs: Roofs | None) -> float:
    """What shares are of: the predicted time at the CPU's roofs; without roofs, the counted cost."""
    return found.counts.cost if roofs is None else found.seconds(roofs)


@dataclass(frozen=True)
class Line(Layers):
    """Repeated layers that are shown as one, under a name that stands for all."""

    name: str
    rows: tuple[LayerPath, ...]

    @property
    def times(self) -> str:
        """How many layers, if there are several."""
        return f"{len(self.rows)} x" if len(self.rows) > 1 else ""

    @property
    def runs_on(self) -> str:
        """The way, if there is a choice, the op and the backend."""
        plan = self.rows[0].plan
        return (f"{plan.path}: " if plan.path else "") + f"{plan.taken.op} on {plan.taken.backend}"

    def notes(self) -> list[str]:
        """Why not other ways and backends; and the ops used beside, with their reasons where plain PyTorch runs them."""
        plan = self.rows[0].plan
        lines = rejections(plan.choice)
        for use in plan.uses:
            lines.append(f"with {use.op} on {use.backend}")
            if use.backend == "reference":
                lines += [f"  {line}" for line in rejections(use)]
        return lines


@dataclass(frozen=True)
class Explanation(Layers):
    """The paths of all layers of a model, in the order they run; ``str()`` of it is a table for people.

    Args:
        tokens: latents and tokens in words.
        layers: every layer that does work.
        latents: what runs the latents, by the first feed-forward: its products, GEGLU and LayerNorm.
        inputs: what describes the tokens, once for all layers: codes of the axes, LayerNorm's scale.
        dtype, device: of the parameters.
    """

    tokens: str
    layers: tuple[LayerPath, ...]
    latents: tuple[Choice, ...] = ()
    inputs: tuple[LayerPath, ...] = ()
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def rows(self) -> tuple[LayerPath, ...]:
        """Inputs and layers."""
        return self.inputs + self.layers

    @property
    def multiply_adds(self) -> int:
        """Of one forward, in matrix products and attention."""
        return self.counts.multiply_adds

    @property
    def exponentials(self) -> int:
        """Of one forward; sines, cosines and the like are among them."""
        return self.counts.exponentials

    @property
    def bytes(self) -> int:
        """Of one forward, as read and written by its operators."""
        return self.counts.bytes

    def shares(self, roofs: Roofs | None = None) -> list[float]:
        """The part of every row in the predicted time; without roofs, in the counted cost."""
        whole = amount(self, roofs) or 1.0
        return [amount(path, roofs) / whole for path in self.rows]

    def folded(self) -> list[Line]:
        """The rows, repeated blocks together. They may differ in bytes: what comes between is counted with one."""

        def same(path: LayerPath) -> tuple:
            counts = [(work.multiply_adds, work.exponentials) for work in (path.counts, path.original)]
            return path.plan.taken.op, path.plan.taken.backend, path.path, *counts

        return [Line(name, tuple(rows)) for name, rows in fold(self.rows, name=lambda path: path.layer, key=same)]

    def to_dict(self, roofs: Roofs | None = None) -> dict:
        """All of it, as JSON can hold it; with roofs also the predicted seconds."""

        def time(found: LayerPath | Layers) -> dict:
            return {} if roofs is None else {"seconds": found.seconds(roofs)}

        shares = self.shares(roofs)
        return {
            "tokens": self.tokens,
            "dtype": self.dtype,
            "device": self.device,
            "layers": [path.to_dict() | {"share": share} | time(path) for path, share in zip(self.rows, shares)],
            "latents": [asdict(choice) for choice in self.latents],
            "total": {"counts": asdict(self.counts), "perceiver_pytorch": asdict(self.original)} | time(self),
            "share_of": "counted cost" if roofs is None else "predicted time",
            "roofs": None if roofs is None else asdict(roofs),
        }

    def __str__(self) -> str:
        lines, folded = [self.tokens], self.folded()
        width = max((len(line.name) for line in folded), default=0)
        for line in folded:
            plan, times = line.rows[0].plan, line.times and f"{line.times} "
            way = f"{plan.path}: " if plan.path else ""
            lines.append(f"{line.name:<{width}}  {times}{plan.taken.op} on {plan.taken.backend} ({way}{line.counts})")
            lines += [f"{'':<{width}}    {note}" for note in line.notes()]
        for choice in self.latents:
            lines += [on_latents(choice), *(f"  {note}" for note in rejections(choice))]
        return "\n".join([*lines, f"in all: {self.counts}", f"perceiver-pytorch: {self.original}"])


def rejections(choice: Choice) -> list[str]:
    """Why not the others, one line each."""
    return [f"not {name}: {'; '.join(why)}" for name, why in choice.rejected.items()]


def on_latents(choice: Choice) -> str:
    """What runs an op of the latents."""
    return f"{choice.op} of the latents on {choice.backend}"


def fold(items: Sequence[T], name: Callable[[T], str], key: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    """Fold items whose dotted names differ in an index alone: ``layers.{0..7}.self_attns.{0..5}.0``.

    Neighbours in an enumeration are folded when they consist of the same: the same names further down, and equal keys.

    Args:
        items: in the order in which they are shown.
        name: of an item.
        key: what has to be equal.

    Returns:
        Names that stand for several items, with these items, in the same order.

    Example:
        >>> from perceiver_fast.insight.explanation import fold
        >>> [name for name, _ in fold(["a.0.x", "a.0.y", "a.1.x", "a.1.y", "b"], name=str, key=lambda item: 1)]
        ['a.{0..1}.x', 'a.{0..1}.y', 'b']
    """
    return _fold([(name(item), [item]) for item in items], key)


def _fold(lines: list[tuple[str, list[T]]], key: Callable[[T], Hashable]) -> list[tuple[str, list[T]]]:
    children: dict[str, list[tuple[str, list[T]]]] = {}
    for name, items in lines:
        head, _, rest = name.partition(".")
        children.setdefault(head, []).append((rest, items))
    inner = {head: _fold(below, key) if any(rest for rest, _ in below) else below for head, below in children.items()}

    def signature(head: str) -> tuple:
        return tuple((rest, len(items), key(items[0])) for rest, items in inner[head])

    folded = []
    # An index is compared with its place, so that only what is enumerated without a gap comes together.
    places = [(head, int(head) - place if head.isdecimal() else head) for place, head in enumerate(inner)]
    for _, run in groupby(places, lambda found: (found[1], signature(found[0]))):
        heads = [head for head, _ in run]
        label = heads[0] if len(heads) == 1 else f"{{{heads[0]}..{heads[-1]}}}"
        for same in zip(*(inner[head] for head in heads)):
            rest, _ = same[0]
            folded.append((f"{label}.{rest}" if rest else label, [item for _, items in same for item in items]))
    return folded
