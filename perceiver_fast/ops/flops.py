"""What the registered ops count: multiply-adds and exponentials from shapes, for explain and for torch's FlopCounterMode.

torch's counter counts two operations a multiply-add of products and attention, and nothing of what is elementwise. Its
module takes a fifth of a second to import (it imports triton), so the formulas join it when somebody else imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from math import prod
from types import ModuleType

import torch

Shape = Sequence[int]
COUNTER = "torch.utils.flop_counter"


def attention(q: Shape, k: Shape, v: Shape, inverted: bool = False) -> tuple[int, int]:
    """q ``[.., N, d]``, k ``[.., M, d]``, v ``[.., M, dv]``; inverted attention computes its logits twice."""
    pairs, passes = prod(q[:-1]) * k[-2], 1 + inverted
    return pairs * (passes * q[-1] + v[-1]), passes * pairs


def attention_backward(q: Shape, k: Shape, v: Shape, inverted: bool = False) -> tuple[int, int]:
    """Logits and weights' gradients (inverted: twice), then the gradients of q, k and v."""
    pairs, passes = prod(q[:-1]) * k[-2], 1 + inverted
    return pairs * (passes * (q[-1] + v[-1]) + 2 * q[-1] + v[-1]), passes * pairs


def grid_attention(q: Shape, feat: Shape, inverted: bool) -> tuple[int, int]:
    """q ``[B, N, L]``, feat ``[B, *sizes, F]``: a logit is F + A multiply-adds, a value F."""
    sizes, features = feat[1:-1], feat[-1]
    pairs, passes = q[0] * q[1] * prod(sizes), 1 + inverted
    return pairs * (passes * (features + len(sizes)) + features), passes * pairs


def grid_attention_backward(q: Shape, feat: Shape, inverted: bool, token_grads: bool) -> tuple[int, int]:
    """Logits and weights' gradients (inverted: twice), the gradient of q, and with token_grads two parts of feat's."""
    sizes, features = feat[1:-1], feat[-1]
    pairs, passes = q[0] * q[1] * prod(sizes), 1 + inverted
    return pairs * (2 * passes * (features + len(sizes)) + features * (3 if token_grads else 1)), passes * pairs


def fourier_projection(feat: Shape | None, coords: Shape, frequencies: Shape, weight: Shape) -> tuple[int, int]:
    """feat ``[B, M, F]``, coords ``[B or 1, M, A]``, frequencies ``[A, K]``, weight ``[C, D]``."""
    tokens = prod((coords if feat is None else feat)[:2])
    return tokens * prod(weight), 2 * prod(coords[:2]) * prod(frequencies)


def fourier_projection_backward(
    feat: Shape | None, coords: Shape, frequencies: Shape, weight: Shape, token_grads: bool
) -> tuple[int, int]:
    """The gradient of weight, and with token_grads the tokens': a product each."""
    multiply_adds, exponentials = fourier_projection(feat, coords, frequencies, weight)
    return multiply_adds * (1 + token_grads), exponentials


# From an op's arguments, tensors as their shapes.
FORMULAS: dict[str, Callable[..., tuple[int, int]]] = {
    "cross_attention_forward": lambda *a: attention(*a[:3], inverted=a[7]),
    "cross_attention_backward": lambda *a: attention_backward(*a[2:5], inverted=a[9]),
    "grid_attention_forward": lambda *a: grid_attention(a[0], a[1], inverted=a[6]),
    "grid_attention_backward": lambda *a: grid_attention_backward(a[3], a[4], inverted=a[9], token_grads=a[14]),
    "fourier_projection_forward": lambda *a: fourier_projection(*a[:4]),
    "fourier_projection_backward": lambda *a: fourier_projection_backward(*a[1:5], token_grads=a[7]),
}
ELEMENTWISE = (
    "geglu_forward", "geglu_backward", "layer_norm_forward", "layer_norm_backward", "grid_scale_forward",
)  # fmt: skip


def register(counter: ModuleType) -> None:
    """Make torch's counter, the module, know all ops of this package."""

    def formula(count: Callable[..., tuple[int, int]]) -> Callable[..., int]:
        return lambda *args, out_shape=None, **keywords: 2 * count(*args)[0]

    formulas = {name: formula(count) for name, count in FORMULAS.items()}
    formulas |= {name: lambda *args, **keywords: 0 for name in ELEMENTWISE}
    for name, flops in formulas.items():
        op = getattr(torch.ops.perceiver_fast, name)
        if op not in counter.flop_registry:  # as it is where this package is imported again
            counter.register_flop_formula(op)(flops)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds the counter as everybody else does, and registers once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Register now where torch's counter is there, else once it is."""
    if COUNTER in sys.modules:
        register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
