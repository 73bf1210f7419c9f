"""Launches as data, so that what is compiled ahead of time, and tested, is what a call launches; how work is split."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from perceiver_fast.gpu import multiprocessors
from perceiver_fast.kernels.configs import MOST, Config

SMALL = Config(queries=1, tokens=1, warps=4)  # of kernels without a tile of attention weights: nothing to choose
TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """One kernel with all its constants: what a call launches.

    Args:
        name: kernel and variant.
        kernel: the function under ``triton.jit``.
        types: of its run-time arguments, as ``"*fp32"`` or ``"i32"``.
        constants: its ``tl.constexpr`` arguments.
        config: tile, warps and stages.
        weights: attention weights that one turn of its innermost loop makes, or 0; every one costs one exponential.
        tensor_cores: whether its products are to run on tensor cores.
        registers: budget a thread.
        divisible: integer arguments that are multiples of 16; pointers always are.
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    config: Config
    weights: int = 0
    tensor_cores: bool = False
    registers: int = 255
    divisible: tuple[str, ...] = ()

    @property
    def exponentials(self) -> int:
        """Exponentials that a thread has to compute in one turn of the loop, at least."""
        return self.weights // (32 * self.config.warps)


_collected: ContextVar[list[Launch] | None] = ContextVar("collected", default=None)


@contextmanager
def collected() -> Iterator[list[Launch]]:
    """Within, and in this thread, launches are listed rather than run; tensors may be on the meta device."""
    token = _collected.set([])
    try:
        yield _collected.get()
    finally:
        _collected.reset(token)


@dataclass(frozen=True)
class Launch:
    """One kernel, the number of its programs, and all its arguments by name, constants too.

    ``config`` and ``weights`` are those of :class:`Instance`.
    """

    kernel: object
    programs: int
    arguments: dict[str, object]
    config: Config = SMALL
    weights: int = 0

    def run(self) -> None:
        """Launch the kernel, or list it where launches are :func:`collected`."""
        launches = _collected.get()
        if launches is not None:
            launches.append(self)
            return
        self.kernel[(self.programs,)](**self.arguments, **self.config.options)

    @property
    def tensor_cores(self) -> bool:
        """Whether its products are to run on tensor cores: as PRECISION says, or else wherever a tensor is in half precision."""
        half = any(torch.is_tensor(t) and t.dtype in (torch.bfloat16, torch.float16) for t in self.arguments.values())
        return self.weights > 0 and self.arguments.get("PRECISION", "bf16" if half else "ieee") in ("bf16", "tf32")

    def mismatches(self) -> list[str]:
        """What is missing or superfluous among the arguments: Triton raises for it at a launch on a GPU, not before."""
        kernel, given, taken = self.kernel.__name__, set(self.arguments), set(self.kernel.arg_names)
        return [f"{kernel} is not given {name}" for name in sorted(taken - given)] + [
            f"{kernel} takes no {name}" for name in sorted(given - taken)
        ]

    def instance(self, name: str) -> Instance:
        """What Triton would compile for these arguments: tensors may be on the meta device.

        Raises:
            TypeError: the arguments are not those of the kernel.
        """
        if wrong := self.mismatches():
            raise TypeError("; ".join(wrong))
        types, constants, divisible = {}, {}, []
        for parameter in self.kernel.params:
            key, value = parameter.name, self.arguments[parameter.name]
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or one:
                constants[key] = value
            elif torch.is_tensor(value):
                types[key] = TYPES[value.dtype]
            else:
                types[key] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
                divisible += [key] * (value % 16 == 0 and not parameter.do_not_specialize)
        return Instance(
            f"{self.kernel.__name__.removesuffix('_kernel')}[{name}]", self.kernel, types, constants, self.config,
            self.weights, self.tensor_cores, self.config.registers or MOST, tuple(divisible),
        )  # fmt: skip


def share(length: int, tile: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Into how many splits a walk over ``length`` rows is cut, which ``programs`` programs take, and rows a split.

    A split is of whole tiles. There are as many as give every multiprocessor two programs, all running at once; one if
    there are programs enough. They depend on shapes and the device alone, so that results are the same bits every time.
    """
    tiles = triton.cdiv(length, tile)
    most = max(1, 2 * multiprocessors(device) // max(programs, 1))
    each = triton.cdiv(tiles, min(most, tiles))
    return triton.cdiv(tiles, each), each * tile


def strides(name: str, axes: str, t: Tensor) -> dict[str, int]:
    """``{q_b: .., q_h: .., q_n: ..}`` of all dimensions but the channels; zero for a dimension of size 1."""
    return {f"{name}_{axis}": stride if size > 1 else 0 for axis, stride, size in zip(axes, t.stride(), t.shape[:-1])}


def aligned_rows(t: Tensor) -> Tensor:
    """``t [B, H, rows, channels]`` itself if rows are dense and begin at multiples of 16 channels; else a copy that is
    so.

    Most views of heads are. Rows are read again for every tile of the other matrix, without alignment two bytes at a
    time.
    """
    apart = strides("t", "bhn", t).values()
    if t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in apart):
        return t
    padded = t.new_empty(*t.shape[:-1], t.shape[-1] + -t.shape[-1] % 16)
    return padded[..., : t.shape[-1]].copy_(t)
