"""The layers of a model by name, and an observer that knows under which name each one runs and what it attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers import Attention, PreNorm
from perceiver_fast.layers.observer import Observer
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.tokens import TokenGroups, Tokens

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterDict)


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is a cross-attention with its norms, or an attention by itself."""
    return is_cross_attention(module) or isinstance(module, Attention)


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is an attention or feed-forward with its norm, or works and has none of these within."""
    if isinstance(module, PreNorm):
        return True
    return not isinstance(module, CONTAINERS) and not any(isinstance(inner, PreNorm) for inner in module.modules())


def layers_of(
    module: nn.Module, is_layer: Callable[[nn.Module], bool] = is_layer, name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a model and their names, a shared one under every name it has; nothing within a layer is another.

    Args:
        module: the model.
        is_layer: what counts as a layer. Default: what :func:`perceiver_fast.explain` has a line for.
        name: of ``module`` in a model around it.
    """
    if is_layer(module):
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None:
            yield from layers_of(child, is_layer, f"{name}.{key}" if name else key)


@dataclass
class Attended:
    """What one attention layer was called with.

    Args:
        layer: the layer, a PreNorm with a context or an :class:`Attention` among ``z``.
        parts: what attends, normalised, ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares it; one of every call,
            as decoders are called for parts of their queries.
        groups: what is attended to; nothing but ``z`` for attention among itself.
        masks: ``[B, M_g]`` or None for each of them.
        inverted: softmax over ``z``, then normalised over the tokens.
        grouped: whether the groups came as :class:`TokenGroups`.
    """

    layer: Any
    parts: list[Tensor]
    groups: Sequence[Tokens]
    masks: Sequence[Tensor | None]
    inverted: bool
    grouped: bool

    @classmethod
    def of(
        cls, layer: nn.Module, z: Tensor, tokens: Tokens | TokenGroups | None, mask: Tensor | None, inverted: bool
    ) -> Attended:
        """From what :meth:`Observer.attends` is told."""
        if isinstance(tokens, TokenGroups):
            return cls(layer, [z], tokens.groups, tokens.masks, inverted, True)
        groups, masks = ([], []) if tokens is None else ([tokens], [None if mask is None else mask.flatten(1)])
        return cls(layer, [z], groups, masks, inverted, False)

    @property
    def attention(self) -> Attention:
        """The layer without its norms."""
        found: Any = self.layer.fn if isinstance(self.layer, PreNorm) else self.layer
        return found

    @property
    def count(self) -> int:
        """How many attend, N."""
        return sum(part.shape[1] for part in self.parts)

    @property
    def z(self) -> Tensor:
        """What attends, in one tensor."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, 1)


class LayerObserver(Observer):
    """An observer that knows layers by name.

    A shared layer runs under its names in turn; called again, it goes on under the last.

    Args:
        layers: names and layers, as of :func:`layers_of`.
    """

    def __init__(self, layers: Iterable[tuple[str, nn.Module]]):
        self._names: dict[int, list[str]] = {}
        for name, layer in layers:
            self._names.setdefault(id(layer), []).append(name)

    def knows(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is one of them; others are of a model within that is not looked at, or of such a layer."""
        return id(layer) in self._names

    def next_name(self, layer: nn.Module) -> str:
        """The name under which ``layer`` runs now; ask once a call."""
        names = self._names[id(layer)]
        return names.pop(0) if len(names) > 1 else names[0]
