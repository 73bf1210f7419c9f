"""Registered operators called raw, with arguments that nobody checked: they return or raise, and never crash.

Exported graphs call operators by themselves, so what an op's Python checks is of no help there. A case takes the
arguments of a sample of the op's declaration and changes a few of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import perceiver_fast  # noqa: F401  (it declares the ops)
from perceiver_fast.ops.declaration import OPS

from .outcome import Outcome

PLAIN: dict[str, str] = {}
HUGE = (2**62, 2**63 - 1, -(2**63), 2**31, -1, 0, 1, 3)
FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1.0, 2.0, 1e308, 5e-324)
DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.complex64,
)


def calls() -> list[tuple[str, Callable[[], tuple]]]:
    """Every registered operator's name with what makes arguments of an ordinary call of it; several for one with options."""
    found = []
    for op in OPS.values():
        for options in op.variants:
            for index, operator in enumerate(op.operators):
                found.append(
                    (operator.name, lambda op=op, options=options, i=index: op.recorded_calls("cpu", **options)[i][1])
                )
    codes = lambda: (5, 3, 8.0, torch.float32, torch.device("cpu"))  # noqa: E731
    return [*found, ("axis_codes", codes)]


TENSOR_CHANGES: dict[str, Callable[[Tensor, random.Random], object]] = {
    "None": lambda t, r: None,
    "more dimensions": lambda t, r: t.unsqueeze(r.randint(0, t.dim())),
    "many dimensions": lambda t, r: t.reshape(*[1] * 66, *t.shape),
    "fewer dimensions": lambda t, r: t.select(r.randrange(t.dim()), 0) if t.dim() and t.numel() else t,
    "flat": lambda t, r: t.flatten(),
    "a number": lambda t, r: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "dtype": lambda t, r: t.to(r.choice(DTYPES)),
    "shorter": lambda t, r: t.narrow(d := r.randrange(t.dim()), 0, t.shape[d] - 1) if t.dim() and t.numel() else t,
    "longer": lambda t, r: torch.cat([t, t], r.randrange(t.dim())) if t.dim() else t,
    "empty": lambda t, r: t.narrow(r.randrange(t.dim()), 0, 0) if t.dim() else t,
    "swapped": lambda t, r: t.transpose(r.randrange(t.dim()), r.randrange(t.dim())) if t.dim() else t,
    "strided": lambda t, r: torch.stack([t, t], -1)[..., 0],
    "backwards of memory": lambda t, r: t.mT.contiguous().mT if t.dim() > 1 else t,
    "expanded": lambda t, r: t[:1].expand(t.shape) if t.dim() and t.numel() else t,
    "huge": lambda t, r: t.flatten()[:1].expand(r.choice([2**33, 2**40, 2**60])) if t.numel() else t,
    "huge in a dimension": lambda t, r: (
        t.narrow(d := r.randrange(t.dim()), 0, 1).expand([r.choice([2**31, 2**40]) if i == d else s for i, s in enumerate(t.shape)])
        if t.dim() and t.numel()
        else t
    ),
    "meta": lambda t, r: t.to("meta"),
    "NaN": lambda t, r: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "infinite": lambda t, r: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    "one element": lambda t, r: t.flatten()[:1].reshape([1] * t.dim()) if t.numel() else t,
    "sparse": lambda t, r: t.to_sparse() if t.dim() else t,
    "another place in memory": lambda t, r: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) if t.numel() else t,
    "learning": lambda t, r: t.clone().requires_grad_() if t.is_floating_point() else t,
    "no storage": lambda t, r: freed(t),
}  # fmt: skip


def freed(t: Tensor) -> Tensor:
    """A tensor whose storage is gone, as sharding libraries leave it."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def change(value: object, r: random.Random) -> tuple[str, object]:
    """An argument changed at random, and how."""
    if isinstance(value, Tensor):
        if value.device.type == "cpu" and not value.is_sparse and value.numel() and not value.data_ptr():
            return "no storage, still", value  # torch itself crashes where it reads or copies such a tensor
        if value.numel() > 2**30:
            return "huge, still", value  # the changes themselves would take hours
        name = r.choice(sorted(TENSOR_CHANGES))
        return name, TENSOR_CHANGES[name](value, r)
    if isinstance(value, bool):
        return "flipped", not value
    if isinstance(value, int):
        return "int", r.choice([*HUGE, None, 0.5])
    if isinstance(value, float):
        return "float", r.choice([*FLOATS, None])
    if isinstance(value, (list, tuple)):
        length = r.choice([0, 1, len(value), len(value) + 1, 70])
        return "list", [r.choice([*value, *HUGE]) for _ in range(length)]
    if isinstance(value, torch.dtype):
        return "dtype", r.choice([*DTYPES, None])
    if isinstance(value, torch.device):
        return "device", r.choice([torch.device("meta"), torch.device("cuda"), None])
    return "something", r.choice([torch.ones(2, 3), torch.ones(1, dtype=torch.int64), 1.0, 7])


def draw(seed: int) -> dict:
    """An operator, by its place in :func:`calls`, and how many changes its arguments get."""
    r = random.Random(seed)
    names = [name for name, _ in calls()]
    call = r.randrange(len(names))
    return dict(
        seed=seed, operator=names[call], call=call, changes=[r.randrange(2**32) for _ in range(r.choice([1, 1, 2, 3]))]
    )


def changed_arguments(case: dict) -> tuple[list, list[str]]:
    """The arguments of a case, and what was done to them, in words."""
    torch.manual_seed(case["seed"])
    name, make = calls()[case["call"]]
    schema = getattr(torch.ops.perceiver_fast, name).default._schema.arguments
    arguments, words = list(make()), []
    for number in case["changes"]:
        r = random.Random(number)
        place = r.randrange(len(arguments))
        how, arguments[place] = change(arguments[place], r)
        words.append(f"{schema[place].name}: {how}")
    return arguments, words


REFUSED = (RuntimeError, IndexError, TypeError, NotImplementedError, ValueError)


def describe(case: dict) -> str:
    """The operator, and what was done to its arguments."""
    try:
        return f"{case['operator']}({', '.join(changed_arguments(case)[1])})"
    except REFUSED as error:
        return f"{case['operator']}: {error}"


def run(case: dict) -> Outcome:
    """Call the operator; read all of what it returns, so that memory that is not there is noticed."""
    outcome = Outcome()
    try:
        arguments, _ = changed_arguments(case)
    except REFUSED:
        outcome.counts["changes that torch refuses"] += 1
        return outcome
    try:
        returned = getattr(torch.ops.perceiver_fast, case["operator"])(*arguments)
        for t in tree_leaves(returned):
            if t.device.type == "cpu" and t.layout == torch.strided and t.numel() < 2**24:
                t.detach().clone().sum()
        outcome.counts["returned"] += 1
    except Exception as error:
        outcome.counts[f"raised {type(error).__name__}"] += 1
    return outcome
