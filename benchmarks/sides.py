"""What is compared: a peer builds a side for a case, a side runs, and what it returns is held against the truth."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from perceiver_fast import extension
from perceiver_fast.insight.geometries import Geometry

OURS = "fast"
SMART = "smart-dense"  # its keys and values come from this package: shown, and left out of "best"
DTYPES = ("float32", "bfloat16")  # bfloat16: autocast, of float32 weights
SHARPENING = 6.0  # of the queries: attention that is nearly uniform would hide a wrong key
PERTURBATION = 0.1  # of LayerNorms' weights and biases, whose initial ones and zeros would hide a missing term
ROUNDINGS = 16  # of the largest tensor: what is smaller than these is not compared with itself

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


@dataclass(frozen=True)
class Side:
    """One implementation, built."""

    apply: Callable[..., Tensor | Results]  # of the inputs; returns the output, or several
    inputs: tuple[Tensor, ...] = ()  # of a call; those that require gradients get them in a step
    # Get gradients too; the order of their names is that of all sides.
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    cotangents: tuple[Tensor, ...] | None = None  # of the outputs; None: those of :func:`cotangent`
    common: Callable[[Results], Results] = tuple  # makes of its outputs and gradients what those of every side are
    plain: Callable | None = None  # counted in place of ``apply``, where its operators are not seen


def leaves(inputs: Sequence[Tensor], wanted: int) -> tuple[Tensor, ...]:
    """The inputs of a side, the first ``wanted`` of which get gradients."""
    return tuple(t.detach().contiguous().requires_grad_(i < wanted) for i, t in enumerate(inputs))


@torch.no_grad()
def perturb(layer: nn.Module, *norms: nn.Module) -> None:
    """Make a layer's attention sharp, and what its LayerNorms learn visible, so that errors show."""
    layer.fn.to_q.weight *= SHARPENING
    for norm in norms:
        for parameter in norm.parameters():
            parameter += PERTURBATION * torch.randn_like(parameter)


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by the names they have in perceiver-pytorch, in their order; torch.compile prefixes them."""
    return {name.removeprefix("_orig_mod."): parameter for name, parameter in sorted(module.named_parameters())}


def run(
    side: Side,
    step: bool,
    autocast: AbstractContextManager,
    inputs: tuple[Tensor, ...] | None = None,
    cotangents: tuple[Tensor, ...] | None = None,
) -> Results:
    """What is timed: the outputs, and of a step the gradients of inputs and parameters, under ``autocast``.

    Args:
        inputs, cotangents: in place of the side's own.
    """
    inputs = side.inputs if inputs is None else inputs
    with torch.set_grad_enabled(step), autocast:
        outputs = side.apply(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not step:
        return outputs
    cotangents = cotangents or side.cotangents or tuple(map(cotangent, outputs))
    wanted = [t for t in inputs if t.requires_grad] + [p for _, p in sorted(side.parameters.items())]
    cotangents = [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)]
    found = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
    return *outputs, *(grad for grad in found if grad is not None)  # PerceiverIO without queries has an idle decoder


def cotangent(out: Tensor) -> Tensor:
    """What a step differentiates ``out`` with: numbers that every dtype holds exactly, so that no side has other ones."""
    return ((torch.arange(out.numel()) % 17 - 6).to(out.dtype) / 8).view(out.shape)


@dataclass(frozen=True)
class Case:
    """What is measured: one peer on one line of a table."""

    level: str
    geometry: Geometry
    pass_name: str
    peer: str
    batch: int = 1
    dtype: str = "float32"

    @property
    def step(self) -> bool:
        """Whether there is a backward pass."""
        return self.pass_name != "forward"

    def call(self, side: Side) -> Call:
        """A call of ``side``: bfloat16 is autocast of float32 weights."""
        return lambda: run(side, self.step, torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"))

    def record(self) -> dict:
        """As results hold it."""
        return {
            "level": self.level, "geometry": self.geometry.name, "pass": self.pass_name, "peer": self.peer,
            "batch": self.batch, "dtype": self.dtype,
        }  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """One implementation at one level."""

    build: Callable[..., Side]  # its side of a case, with the weights that all peers share
    reasons: Callable[..., list[str]] = lambda case: []  # why it cannot run a case
    packages: tuple[str, ...] = ()  # without which it is absent
    install: str = ""  # how to get them
    compiled: bool = False  # whether torch.compile takes its time
    fits: Callable[..., bool] = lambda case: True  # in a case, it is no other peer under another name

    def absent(self) -> list[str]:
        """Which package cannot be imported, and how to get it; empty where all can."""
        for package in self.packages:
            try:
                importlib.import_module(package)
            except Exception as error:  # a broken installation raises whatever it likes
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                return [f"{package} cannot be imported ({why})" + f": {self.install}" * bool(self.install)]
        return []


def ours(build: Callable[..., Side]) -> Peer:
    """perceiver-fast, as long as it has its kernels: without them its times would be plain PyTorch's."""
    return Peer(build, lambda case: [] if extension.error is None else [extension.error])


def compiled(build: Callable[..., Side], **options: object) -> Peer:
    """``torch.compile`` of what ``build`` makes, for the one shape it is called with; ``options`` are :class:`Peer`'s."""

    def build_compiled(case: object) -> Side:
        side = build(case)
        return replace(side, apply=torch.compile(side.apply, dynamic=False), plain=side.apply)

    return Peer(build_compiled, **{"reasons": lambda case: compile_reasons(), "compiled": True, **options})


@dataclass(frozen=True)
class Level:
    """Whole models, one cross-attention layer, or an op."""

    peers: dict[str, Peer]  # by the names that results have
    truth: Callable[[Case], Side]  # in float64, what the others are checked against; the case's peer does not matter
    attentions: Callable[[Geometry], int] = lambda geometry: 0  # of the latents to the input in a forward
    latents: bool = False  # whether its rows are latents, no tokens of the input
    op: bool = True  # whether its results count among the bytes that have to pass
    needs: Callable[[Case], dict[str, int]] = lambda case: {}  # memory of a case, in bytes by what takes it
    passes: tuple[str, ...] = ("forward", "step")  # that are measured
    dtypes: tuple[str, ...] = DTYPES[:1]  # likewise


def compile_reasons() -> list[str]:
    """Why torch.compile cannot run here."""
    compiler = os.environ.get("CXX", "g++")
    return [] if shutil.which(compiler) else [f"torch.compile needs the C++ compiler {compiler}, which was not found"]


def relative_error(values: Sequence[Tensor], truths: Sequence[Tensor], dtype: str = "float32") -> float:
    """The largest ``|value - truth| / |truth|`` in the 2-norm over pairs of tensors.

    A truth below some roundings of the largest is the rounding of what it was computed from (inverted attention's gradient
    of the queries' bias is zero in exact arithmetic); it counts as these.
    """
    pairs = [(value.detach().double(), truth.detach().double()) for value, truth in zip(values, truths, strict=True)]
    least = ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps * max(truth.norm() for _, truth in pairs)
    return float(torch.stack([(value - truth).norm() / truth.norm().clamp_min(least) for value, truth in pairs]).max())


def errors(results: Sequence[Tensor], truths: Sequence[Tensor], dtype: str = "float32") -> dict[str, float | None]:
    """Relative errors of the output, and of the gradients that follow it after a step."""
    gradients = relative_error(results[1:], truths[1:], dtype) if len(truths) > 1 else None
    return {"relative_error": relative_error(results[:1], truths[:1], dtype), "gradient_error": gradients}


def excess(found: dict[str, float | None], most: tuple[float, float]) -> list[str]:
    """Which errors are larger than ``most`` (of the output, of the gradients) or no numbers; none: they agree."""
    pairs = zip(("output is", "gradients are"), found.values(), most, strict=True)
    return [
        f"the {what} off by {error:.2e}, more than {limit:.0e}"
        for what, error, limit in pairs
        if error is not None and not error <= limit
    ]
