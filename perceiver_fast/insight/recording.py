"""What each layer of a model does while it runs: its operators, and what its attention attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from perceiver_fast.backends import Choice
from perceiver_fast.insight.observe import Attended, LayerObserver, layers_of
from perceiver_fast.insight.work import Counted, WorkCounter
from perceiver_fast.layers import PreNorm
from perceiver_fast.layers.observer import observer, observing
from perceiver_fast.layers.plan import Plan
from perceiver_fast.layers.pre_norm import why_modules
from perceiver_fast.ops.library import autocast_dtype
from perceiver_fast.tokens import DenseTokens, GridTokens, Tokens, fourier


class Call(NamedTuple):
    """One call of a layer: the shape of what came in, and whether the result is added to it."""

    shape: torch.Size | None
    residual: bool


@dataclass
class Row:
    """One layer, or one group of tokens of a cross-attention.

    Args:
        name: the layer's name in the model.
        module: the layer.
        calls: of the layer under this name; groups share them.
        attended: of a cross-attention, once for every input that is attended to; groups share them.
        group: which group of tokens. Default: all of them.
        last: whether it is the last group, with which is counted what they share.
        plan: of a cross-attention, the way taken.
        operators: that were called, in order.
    """

    name: str
    module: nn.Module | None
    calls: list[Call] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    group: int | None = None
    last: bool = True
    plan: Plan | None = None
    operators: list[Counted] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name, and the group's number."""
        return self.name if self.group is None else f"{self.name} [{self.group}]"

    @property
    def inner(self) -> nn.Module | None:
        """The layer without its norm."""
        return self.module.fn if isinstance(self.module, PreNorm) else self.module


class Recorder(LayerObserver):
    """Rows of a model's layers, filled while it runs in :meth:`attached`.

    What runs between two layers is counted with the one before, as a residual connection is, and before the first one
    with the tokens.

    Attributes:
        counter: counts the operators.
        rows: the layers', in the order they ran.
        tokens: the row of what runs before the first layer.
        described: the input's descriptions, and whether they are groups of one input.
        shared: operators by which these describe themselves, once for all layers.
    """

    needs_queries = False

    def __init__(self, model: nn.Module, counter: WorkCounter):
        layers = list(layers_of(model))
        super().__init__(layers)
        self.counter = counter
        self.rows: list[Row] = []
        self.tokens = Row("tokens", None)
        self.described: list[tuple[Tokens, bool]] = []
        self.shared: list[Counted] = []
        self._silent = {module for _, module in layers if not isinstance(module, PreNorm)}  # do not say when they begin
        self._by_name: dict[str, list[Row]] = {}  # one row, or one a group
        self._now: list[Row] = []  # the rows of the layer that runs
        self._group = 0  # the next one
        self._first: list[Row] | None = None  # the rows of the first cross-attention

    @contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Calls of the model inside, in this thread, are recorded."""
        # What is no PreNorm may be anybody's module, and nothing but a hook tells that it is called. The hook is there
        # for all threads: in another one it finds another observer, or none, and does nothing.
        handles = [module.register_forward_pre_hook(self._called, with_kwargs=True) for module in self._silent]
        self.counter.operators = self.tokens.operators
        try:
            with observing(self), fourier.uncached():
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, module: nn.Module, inputs: tuple, keywords: dict | None = None) -> None:
        # Another thread that calls the module while the hook is put on or removed may take it for one without keywords.
        if observer() is self:
            x = next(iter((*inputs, *(keywords or {}).values())), None)
            self.begins(module, getattr(x, "shape", None), residual=False)

    def begins(self, layer: nn.Module, shape: torch.Size | None, residual: bool) -> None:
        if not self.knows(layer):
            return
        name = self.next_name(layer)
        if name not in self._by_name:  # else it is called again, as a decoder is for parts of its queries
            self._by_name[name] = [Row(name, layer)]
            self.rows += self._by_name[name]
        self._now, self._group = self._by_name[name], 0
        self._now[0].calls.append(Call(shape, residual))
        self.counter.operators = self._now[0].operators

    def attends(self, layer, z, tokens=None, mask=None, inverted=False, fused=True) -> None:
        if tokens is None or not self.knows(layer):
            return
        row, attended = self._now[0], Attended.of(layer, z, tokens, mask, inverted)
        for known in row.attended:
            if [*map(id, known.groups)] == [*map(id, attended.groups)]:  # the very same descriptions
                known.parts.append(z)
                break
        else:
            row.attended.append(attended)
        if not fused:
            why = why_modules(layer) or "what it is called with is more than a plain tensor"
            row.plan = row.plan or Plan("modules", Choice("cross_attention", "torch", {"fused": [why]}))
            for group in attended.groups:
                self._describe(layer, group, row.plan, attended.grouped)

    def decodes(self, layer, shape, latents, plan) -> None:
        if self.knows(layer):
            row = self._now[0]
            row.plan = row.plan or plan
            row.attended.append(
                Attended.of(layer, latents.new_empty(1).expand(shape), DenseTokens(latents), None, False)
            )

    def plans(self, layer, z, tokens, mask, inverted, grouped, plan) -> None:
        if not self.knows(layer):
            return
        if self._group == len(self._now):
            first, last = self._now[0], self._now[-1]
            last.last = False
            self._now.append(Row(first.name, layer, first.calls, first.attended))
            self.rows.append(self._now[-1])
        row = self._now[self._group]
        row.group = self._group if grouped else None
        row.plan = row.plan or plan
        self._group += 1
        self.counter.operators = row.operators
        self._describe(layer, tokens, plan, grouped)

    def _describe(self, layer: PreNorm, tokens: Tokens, plan: Plan, grouped: bool) -> None:
        """Let the input's tokens compute what all layers share outside of the layer that asks first."""
        self._first = self._first or self._now
        if self._first is not self._now or any(tokens is known for known, _ in self.described):
            return
        self.described.append((tokens, grouped))
        norm: Any = layer.norm_context
        with self.counter.into(self.shared):
            if plan.path == "modules":
                tokens.tensor()
            elif isinstance(tokens, GridTokens):
                tokens.scale(norm.eps)
            elif isinstance(tokens, DenseTokens) and not plan.uses:
                tokens.normalized(norm.eps, autocast_dtype(tokens.device) if plan.path == "projected" else None)
