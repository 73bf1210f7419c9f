"""Small models: where one call for several layers pays, since calls cost more than what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perceiver_fast.gpu import INTERPRETED
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.ops.declaration import Op
from perceiver_fast.ops.library import autocast_dtype
from perceiver_fast.ops.pointwise import runs_kernel
from perceiver_fast.tracing import intercepted

MOST_LATENTS = 256
MOST_CHANNELS = 256


def is_small(stream: ResidualStream, op: Op) -> bool:
    """Whether latents are so few that ``op`` is faster than several, and nothing keeps it from running.

    An observer, or a mode that sees operators one by one, is shown layer by layer.
    """
    if torch.compiler.is_compiling() or INTERPRETED:  # what is interpreted are kernels of the ops that layers call
        return False
    shape, device = stream.shape, stream.device
    if device.type != "cpu" or len(shape) != 3 or 0 in shape:
        return False
    if shape[1] > MOST_LATENTS or shape[2] > MOST_CHANNELS:
        return False
    if autocast_dtype(device) is not None or observer() is not None or intercepted():
        return False
    return runs_kernel(op, stream.dtype, device)


def fit(parameters: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], stream: ResidualStream) -> bool:
    """Whether all parameters are there, of these shapes, and of the stream's dtype and device."""
    dtype, device = stream.dtype, stream.device
    for p, shape in zip(parameters, shapes):
        if p is None or p.dtype is not dtype or p.shape != shape or p.device != device:
            return False
    return True
