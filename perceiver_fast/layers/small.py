"""Small models: where one call for several layers pays, since calls cost more than what they compute."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_fast import extension
from perceiver_fast.gpu import INTERPRETED
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.ops.declaration import Op
from perceiver_fast.ops.library import autocast_dtype, compute_dtype
from perceiver_fast.ops.pointwise import runs_kernel
from perceiver_fast.ops.sdpa import HALF
from perceiver_fast.tracing import intercepted

# Latents that one op is faster for, in training too: measured on one thread of an AMD EPYC (Zen 4), 2026-11-30, by models of
# one cross-attention and two blocks of layers. Up to here it was 1.1 to 2.8 times as fast as layer by layer, and beyond, in
# training, 0.8 to 0.9 times.
MOST_LATENTS, MOST_CHANNELS = 512, 256
MOST_NUMBERS = {"avx512": 2**16}
MOST_NUMBERS_ELSEWHERE = 2**15
# Multiply-adds of a product from D to D channels up to which float32 in one op is faster than half precision layer by layer,
# under autocast or with parameters of it: measured there, 1.2 to 4 times. Beyond, up to half as fast. Tiles (AMX) were not
# measured; they multiply some four times as fast.
MOST_HALF, MOST_HALF_ON_TILES = 3 * 2**21, 2**20


def is_small(stream: ResidualStream, op: Op, batch: int) -> bool:
    """Whether latents of a batch are so few that ``op`` is faster than several, and nothing keeps it from running.

    Half precision is computed in float32 there. An observer, or a mode that sees operators one by one, is shown layer by
    layer.
    """
    if torch.compiler.is_compiling() or INTERPRETED:  # what is interpreted are kernels of the ops that layers call
        return False
    shape, device = stream.shape, stream.device
    if device.type != "cpu" or len(shape) != 3 or 0 in shape:
        return False
    if not are_few(shape[1], shape[2]):
        return False
    if observer() is not None or intercepted():
        return False
    if is_half(stream):
        if batch * shape[1] * shape[2] ** 2 > most_half():
            return False
    return runs_kernel(op, compute_dtype(stream.dtype), device)


def most_half() -> int:
    """Multiply-adds of a product up to which float32 in one op is faster here than half precision in several."""
    return MOST_HALF_ON_TILES if torch.cpu._is_amx_tile_supported() else MOST_HALF


def is_half(stream: ResidualStream) -> bool:
    """Whether layers one by one would compute in half precision."""
    return stream.dtype in HALF or autocast_dtype(stream.device) is not None


def are_few(latents: int, channels: int) -> bool:
    """Whether latents ``[latents, channels]`` are so few that one op for several layers is faster."""
    if latents > MOST_LATENTS or channels > MOST_CHANNELS:
        return False
    return latents * channels <= most_numbers()


@functools.cache
def most_numbers() -> int:
    """How many numbers few latents are at most, on the instruction set that runs here."""
    isa = "" if extension.module is None else extension.module.active_isa()
    return MOST_NUMBERS.get(isa, MOST_NUMBERS_ELSEWHERE)


def fit(parameters: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], stream: ResidualStream) -> bool:
    """Whether all parameters are there, of these shapes, and of the stream's dtype and device."""
    dtype, device = stream.dtype, stream.device
    for p, shape in zip(parameters, shapes):
        if p is None or p.dtype is not dtype or p.shape != shape or p.device != device:
            return False
    return True
