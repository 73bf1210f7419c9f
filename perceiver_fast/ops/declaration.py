"""An op says once what there is to know of it; everything else loops over these declarations.

    OPS["geglu"].backends       what can run it, in order of preference, and why not
    OPS["geglu"].operators      the operators registered with torch: schemas, outputs without content, work, Triton kernels
    OPS["geglu"].sample         an ordinary call of small tensors, or of those that GPU kernels are compiled for

``info`` lists the backends, ``explain`` and torch's FLOP counter take the work, ``info --kernels`` and the tests compile
the Triton kernels ahead of time, ``profile`` filters their names, and tests/ops/test_declarations.py checks every operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from perceiver_fast import backends
from perceiver_fast.backends import Backend, Choice
from perceiver_fast.gpu import INTERPRETED
from perceiver_fast.ops import proof
from perceiver_fast.ops.library import library
from perceiver_fast.ops.make import Make
from perceiver_fast.ops.trial import Call
from perceiver_fast.ops.work import Work


@dataclass(frozen=True)
class Operator:
    """One operator registered with torch, such as an op's forward.

    Args:
        schema: as torch.library takes it, without the namespace.
        outputs: from the operator's arguments its outputs without content, torch's "fake kernel".
        work: from the operator's arguments, tensors as their shapes, its multiply-adds and exponentials; ``no_work``
            where it is elementwise and counts by its bytes.
        triton: where its Triton kernel is, ``"module.function"`` within kernels/. Default: there is none.
        cuda: where what has CUDA kernels in it is, in the place of Triton's, likewise. Default: there is none, or it is
            the CUDA library's own.
        asks: from the operator's arguments the call that the op's backends are asked about, which decides between the
            two. Needed with ``cuda`` alone.
    """

    schema: str
    outputs: Callable[..., object]
    work: Callable[..., Work]
    triton: str | None = None
    cuda: str | None = None
    asks: Callable[..., object] | None = None

    @property
    def name(self) -> str:
        """What torch calls it, without the namespace."""
        return self.schema.partition("(")[0]

    @property
    def packet(self) -> torch._ops.OpOverloadPacket:
        """What is called: ``torch.ops.perceiver_fast.<name>``."""
        return getattr(torch.ops.perceiver_fast, self.name)

    @cached_property
    def _arguments(self) -> list[tuple[str, bool]]:
        """Its arguments' names, and whether they have to be tensors."""
        arguments = self.packet.default._schema.arguments
        return [(argument.name, argument.type.kind() == "TensorType") for argument in arguments]

    def check_tensors(self, arguments: Sequence[object]) -> None:
        """Raise TypeError or ValueError unless tensors are there, and all on one device.

        torch lets None through for a tensor, and chooses a kernel by the tensors' devices together: a single one on
        "meta" has it take outputs without content for results, and one on a GPU brings those of the CPU to its kernels.
        """
        devices = set()
        for (name, tensor), value in zip(self._arguments, arguments):
            if isinstance(value, Tensor):
                devices.add(value.device)
            elif isinstance(value, (list, tuple)):
                devices.update(each.device for each in value if isinstance(each, Tensor))
            elif tensor:
                raise TypeError(
                    f"{self.name}: expected a tensor for {name}, got {value}; only optional ones may be left out"
                )
        if len(devices) > 1:
            pairs = zip(self._arguments, arguments)
            got = (
                f"{name} on {each.device}"
                for (name, _), value in pairs
                for each in tree_leaves(value)
                if isinstance(each, Tensor)
            )
            raise ValueError(
                f"{self.name}: expected all tensors on one device, got {', '.join(got)}; move them with .to(..)"
            )

    def fake(self, *arguments: object) -> object:
        """Its outputs without content, as torch asks for them of tensors that have none."""
        self.check_tensors(arguments)
        return self.outputs(*arguments)

    def count(self, arguments: Sequence[object]) -> Work:
        """The work of one call."""
        return self.work(*tree_map_only(Tensor, lambda t: t.shape, arguments))

    def triton_kernel(self) -> Callable:
        """The function that launches its Triton kernels; its module, and with it triton, is imported here."""
        return _within_kernels(self.triton or "")

    def gpu_kernel(self, op: Op, arguments: Sequence[object]) -> Callable:
        """The function that runs it on a GPU: Triton's, or the one with CUDA kernels where the op gives it the call."""
        if self.cuda is not None and self.asks is not None and op.choose(self.asks(*arguments)).backend == "cuda":
            return _within_kernels(self.cuda)
        return self.triton_kernel()


def _within_kernels(name: str) -> Callable:
    module, _, function = name.partition(".")
    return getattr(importlib.import_module(f"perceiver_fast.kernels.{module}"), function)


@dataclass(frozen=True)
class Op:
    """What the package knows of one op.

    Args:
        name: its stem, in all rooms: reference, ops, kernels, csrc, tests.
        backends: in order of preference.
        operators: registered with torch.
        call: from dtype and device an ordinary call, as :attr:`backends` are asked about it.
        sample: ``sample(make, **options)`` calls the op on tensors made by :class:`Make` and returns its differentiable
            outputs. Without options on small ones.
        variants: options of the small samples that its operators are checked on. Default: none.
        instances: options of the samples whose Triton kernels are compiled ahead of time, by what to call them.
        kernels: a regular expression of the names of its GPU kernels. Default: they begin with the op's name.
        trial: the small call by which they prove themselves on a GPU, see :mod:`perceiver_fast.ops.proof`. Default: it
            has none.
    """

    name: str
    backends: tuple[Backend, ...]
    operators: tuple[Operator, ...]
    call: Callable[[torch.dtype, torch.device], object]
    sample: Callable[..., Tensor | tuple[Tensor, ...]]
    variants: tuple[Mapping[str, object], ...] = ({},)
    instances: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    kernels: str = ""
    trial: Call | None = None

    def choose(self, call: object) -> Choice:
        """The backend that runs ``call``, a forced one or the first that can; its name is None where none can."""
        return backends.choose(self.name, self.backends, call)

    def require(self, call: object) -> str:
        """The name of the backend that runs ``call``.

        Raises:
            perceiver_fast.backends.BackendError: none can, or the forced one cannot.
        """
        found: Any = backends.require(self.choose(call)).backend
        return found

    def cannot(self, backend: str, call: object) -> list[str]:
        """Why a backend cannot run ``call``."""
        (named,) = (found for found in self.backends if found.name == backend)
        return named.reasons(call)

    def run_sample(self, device: torch.device | str, **options: object) -> list[Tensor]:
        """Call the op's sample and its gradients by all that can have one; returns both."""
        make = Make(device)
        outputs = [t for t in tree_leaves(self.sample(make, **options)) if isinstance(t, Tensor)]
        learning = [t for t in outputs if t.requires_grad]
        grads = torch.autograd.grad(learning, make.leaves, [torch.ones_like(t) for t in learning], allow_unused=True)
        return outputs + [grad for grad in grads if grad is not None]

    def recorded_calls(self, device: torch.device | str, **options: object) -> list[tuple[Operator, tuple]]:
        """The calls of its operators, with their arguments, that its sample makes on a device, gradients included."""
        calls: list[tuple[Operator, tuple]] = []

        def record(operator: Operator, arguments: tuple) -> object:
            calls.append((operator, tree_map_only(Tensor, Tensor.detach, arguments)))
            return operator.packet(*arguments)

        with replaced(record):
            self.run_sample(device, **options)
        return calls


OPS: dict[str, Op] = {}
"""All ops by name, in the order in which they are declared."""

OPERATORS: dict[str, Operator] = {}
"""All registered operators by name."""


def declare(name: str, **facts: Any) -> Op:
    """Declare an op: see :class:`Op`. Its operators are registered with torch, and with their Triton kernels."""
    proved = tuple(proof.proved(name, backend, facts.get("trial")) for backend in facts["backends"])
    op = Op(name, **{"kernels": f"{name}_(.*_)?kernel", **facts, "backends": proved})
    OPS[name] = op
    for operator in op.operators:
        OPERATORS[operator.name] = operator
        library.define(operator.schema)
        library.fake(operator.name)(operator.fake)
        if operator.triton is not None:
            _register_triton(op, operator)
    return op


def _register_triton(op: Op, operator: Operator) -> None:
    def run(*arguments: Any) -> Any:
        operator.check_tensors(arguments)
        kernel = operator.gpu_kernel(op, arguments)
        device = next(
            value.device for value in arguments if isinstance(value, Tensor)
        )  # a missing gradient comes first
        if device.type != "cuda":
            return kernel(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current device, and on its current stream
            return kernel(*arguments)

    library.impl(operator.name, run, "CUDA")
    if INTERPRETED:
        library.impl(operator.name, run, "CPU", allow_override=True)


class _Replaced(TorchDispatchMode):
    def __init__(self, run: Callable[[Operator, tuple], object]):
        super().__init__()
        self.run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        operator = OPERATORS.get(func._schema.name.removeprefix("perceiver_fast::"))
        return func(*args, **(kwargs or {})) if operator is None else self.run(operator, args)


@contextmanager
def replaced(run: Callable[[Operator, tuple], object]) -> Iterator[None]:
    """Within, ``run(operator, arguments)`` stands in for calls of this package's operators, forward and backward."""
    with _Replaced(run):
        yield
