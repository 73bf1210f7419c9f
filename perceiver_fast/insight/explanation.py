"""What ``explain`` found: the way of every layer, and its counted work beside perceiver-pytorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from perceiver_fast.backends import Choice
from perceiver_fast.insight.fold import Folded, fold
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.insight.work import Operator, total
from perceiver_fast.ops.work import Work


@dataclass(frozen=True)
class LayerPath:
    """One layer: its name in the model, the way taken, the op and backend that run it, and what it counts.

    Args:
        layer: its name; of groups of tokens with the group's number.
        choice: op and backend, and why other ways and backends were passed over.
        path: of a cross-attention, the way.
        work: of a cross-attention, the plan's work of the ways that were open, of one batch element.
        uses: ops that describe the tokens on this way.
        operators: every operator that runs, in order, with its counts.
        original: what perceiver-pytorch counts for the same layer.
    """

    layer: str
    choice: Choice
    path: str = ""
    work: dict[str, Work] = field(default_factory=dict)
    uses: tuple[Choice, ...] = ()
    operators: tuple[Operator, ...] = ()
    original: Work = field(default_factory=Work)

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
            **_choice(self.choice),
            "path": self.path,
            "uses": [_choice(use) for use in self.uses],
            **asdict(self.counts),
            "perceiver_pytorch": asdict(self.original),
            "operators": [{"name": operator.name, **asdict(operator.counts)} for operator in self.operators],
        }


@dataclass(frozen=True)
class Explanation:
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
    def counts(self) -> Work:
        """What one forward counts."""
        return sum((path.counts for path in self.rows), Work())

    @property
    def original(self) -> Work:
        """What one forward of perceiver-pytorch's model counts."""
        return sum((path.original for path in self.rows), Work())

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

    def seconds(self, roofs: Roofs) -> float:
        """Predicted time of one forward at the CPU's roofs."""
        return sum(path.seconds(roofs) for path in self.rows)

    def shares(self, roofs: Roofs | None = None) -> list[float]:
        """The part of every row in the predicted time; without roofs, in the counted cost."""
        parts = [path.counts.cost if roofs is None else path.seconds(roofs) for path in self.rows]
        whole = sum(parts)
        return [part / whole if whole else 0.0 for part in parts]

    def folded(self) -> list[Folded]:
        """The rows, repeated blocks together. They may differ in bytes: what comes between is counted with one."""

        def same(path: LayerPath) -> tuple:
            counts = [(work.multiply_adds, work.exponentials) for work in (path.counts, path.original)]
            return path.choice.op, path.choice.backend, path.path, *counts

        return fold(self.rows, name=lambda path: path.layer, key=same)

    def to_dict(self, roofs: Roofs | None = None) -> dict:
        """All of it, as JSON can hold it; with roofs also the predicted seconds."""
        rows = [path.to_dict() | {"share": share} for path, share in zip(self.rows, self.shares(roofs))]
        whole = {"counts": asdict(self.counts), "perceiver_pytorch": asdict(self.original)}
        if roofs is not None:
            rows = [row | {"seconds": path.seconds(roofs)} for row, path in zip(rows, self.rows)]
            whole["seconds"] = self.seconds(roofs)
        return {
            "tokens": self.tokens,
            "dtype": self.dtype,
            "device": self.device,
            "layers": rows,
            "latents": [_choice(choice) for choice in self.latents],
            "total": whole,
            "share_of": "counted cost" if roofs is None else "predicted time",
            "roofs": None if roofs is None else asdict(roofs),
        }

    def __str__(self) -> str:
        lines, folded = [self.tokens], self.folded()
        width = max((len(line.name) for line in folded), default=0)
        for name, paths in folded:
            path, times = paths[0], f"{len(paths)} x " if len(paths) > 1 else ""
            way, counts = f"{path.path}: " if path.path else "", sum((path.counts for path in paths), Work())
            lines.append(f"{name:<{width}}  {times}{path.choice.op} on {path.choice.backend} ({way}{counts})")
            lines += [f"{'':<{width}}    {note}" for note in notes(path)]
        for choice in self.latents:
            lines.append(f"{choice.op} of the latents on {choice.backend}")
            lines += [f"  {note}" for note in rejections(choice)]
        lines.append(f"in all: {self.counts}")
        lines.append(f"perceiver-pytorch: {self.original}")
        return "\n".join(lines)


def rejections(choice: Choice) -> Sequence[str]:
    """Why not the others, one line each."""
    return [f"not {name}: {'; '.join(why)}" for name, why in choice.rejected.items()]


def notes(path: LayerPath) -> list[str]:
    """Why not other ways and backends; and the ops used beside, with their reasons where plain PyTorch runs them."""
    lines = list(rejections(path.choice))
    for use in path.uses:
        lines.append(f"with {use.op} on {use.backend}")
        if use.backend == "reference":
            lines += [f"  {line}" for line in rejections(use)]
    return lines


def _choice(choice: Choice) -> dict:
    return {"op": choice.op, "backend": choice.backend, "rejected": choice.rejected}
