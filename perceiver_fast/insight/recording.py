"""What each layer of a model does while it runs: its operators, and what its attention attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.insight.work import Operator, WorkCounter
from perceiver_fast.layers import PreNorm
from perceiver_fast.layers.observer import Observer, observing
from perceiver_fast.layers.plan import Plan
from perceiver_fast.layers.pre_norm import why_modules
from perceiver_fast.tokens import DenseTokens, GridTokens, TokenGroups, Tokens, fourier


@dataclass
class Attended:
    """What latents ``[B, N, D]`` (or ``[1, N, D]``, shared by the batch) attended to, and how."""

    tokens: Tokens
    plan: Plan
    shape: torch.Size
    masked: bool
    inverted: bool


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
        calls: of the layer under this name.
        group: which group of tokens. Default: all of them.
        last: whether it is the last group, with which is counted what they share.
        attended: of a cross-attention, once for every description of tokens.
        operators: that were called, in order.
    """

    name: str
    module: nn.Module | None
    calls: list[Call] = field(default_factory=list)
    group: int | None = None
    last: bool = True
    attended: list[Attended] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name, and the group's number."""
        return self.name if self.group is None else f"{self.name} [{self.group}]"


def layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model and their names: attention and feed-forwards with their norms, and what has none within.

    A module that is shared comes once for every name.
    """
    if isinstance(module, nn.ParameterDict):
        return
    inner = (m for m in module.modules() if m is not module)
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if isinstance(module, PreNorm) or not (container or any(isinstance(m, PreNorm) for m in inner)):
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from layers_of(child, f"{name}.{key}" if name else key)


class Recorder(Observer):
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

    def __init__(self, model: nn.Module, counter: WorkCounter):
        self.counter = counter
        self.rows: list[Row] = []
        self.tokens = Row("tokens", None)
        self.described: list[tuple[Tokens, bool]] = []
        self.shared: list[Operator] = []
        layers = list(layers_of(model))
        self._modules = list({id(module): module for _, module in layers}.values())
        names: dict[int, list[str]] = {}
        for name, module in layers:
            names.setdefault(id(module), []).append(name)
        self._names = {key: iter(found) for key, found in names.items()}  # in the order a shared one runs under them
        self._groups: dict[int, list[Row]] = {}  # of every module under its present name: one row, or one a group
        self._group = 0  # the next one
        self._input_groups: list[Row] | None = None  # of the first cross-attention

    @contextmanager
    def attached(self) -> Iterator[Recorder]:
        """Calls of the model inside are recorded."""
        # What is no PreNorm is called in any case; a hook on a PreNorm would keep fused ops from standing in for it.
        called = [module for module in self._modules if not isinstance(module, PreNorm)]
        handles = [module.register_forward_pre_hook(self._called, with_kwargs=True) for module in called]
        codes, fourier._cache = fourier._cache, {}  # kept for the process: here they count
        self.counter.operators = self.tokens.operators
        try:
            with observing(self):
                yield self
        finally:
            fourier._cache = codes
            for handle in handles:
                handle.remove()

    def _called(self, module: nn.Module, inputs: tuple, keywords: dict) -> None:
        x = next(iter((*inputs, *keywords.values())), None)
        self.begins(module, getattr(x, "shape", None), residual=False)

    def begins(self, layer: nn.Module, shape: torch.Size | None, residual: bool) -> None:
        if id(layer) not in self._names:  # within a layer that counts as a whole
            return
        name = next(self._names[id(layer)], None)
        if name is not None:  # else it is called again under its last name, as a decoder is for parts of its queries
            self._groups[id(layer)] = [Row(name, layer)]
            self.rows += self._groups[id(layer)]
        row = self._groups[id(layer)][0]
        row.calls.append(Call(shape, residual))
        self._group = 0
        self.counter.operators = row.operators

    def attends(self, layer, z, tokens=None, mask=None, inverted=False, fused=True) -> None:
        if fused or tokens is None or id(layer) not in self._names:
            return
        why = why_modules(layer) or "what it is called with is more than a plain tensor"
        plan = Plan("modules", Choice("cross_attention", "torch", {"fused": [why]}))
        groups = tokens.groups if isinstance(tokens, TokenGroups) else [tokens]
        for group in groups:
            self._attend(layer, z, group, mask is not None, inverted, len(groups) > 1, plan, self._groups[id(layer)][0])

    def plans(self, layer, z, tokens, mask, inverted, grouped, plan) -> None:
        if id(layer) in self._names:
            self._attend(layer, z, tokens, mask is not None, inverted, grouped, plan, self._next_group(layer, grouped))

    def _attend(
        self,
        layer: PreNorm,
        z: Tensor,
        tokens: Tokens,
        masked: bool,
        inverted: bool,
        grouped: bool,
        plan: Plan,
        row: Row,
    ) -> None:
        known = next((attended for attended in row.attended if attended.tokens is tokens), None)
        if known is None:
            row.attended.append(Attended(tokens, plan, z.shape, masked, inverted))
            self._describe(layer, tokens, plan, grouped)
        else:  # more queries to the same
            known.shape = torch.Size([known.shape[0], known.shape[1] + z.shape[1], known.shape[2]])

    def _next_group(self, module: PreNorm, grouped: bool) -> Row:
        groups = self._groups[id(module)]
        if self._group == len(groups):
            groups[-1].last = False
            groups.append(Row(groups[0].name, module, groups[0].calls))
            self.rows.append(groups[-1])
        row = groups[self._group]
        row.group = self._group if grouped else None
        self._group += 1
        self.counter.operators = row.operators
        return row

    def _describe(self, module: PreNorm, tokens: Tokens, plan: Plan, grouped: bool) -> None:
        """Let the input's tokens compute what all layers share outside of the layer that asks first."""
        self._input_groups = self._input_groups or self._groups[id(module)]
        if self._input_groups is not self._groups[id(module)]:
            return
        self.described.append((tokens, grouped))
        with self.counter.into(self.shared):
            if plan.path == "modules":
                tokens.tensor()
            elif isinstance(tokens, GridTokens):
                tokens.scale(module.norm_context.eps)
            elif isinstance(tokens, DenseTokens) and not tokens.uses(plan.path):
                tokens.normalized(module.norm_context.eps)
