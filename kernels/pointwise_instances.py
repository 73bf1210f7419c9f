"""What :mod:`perceiver_fast.kernels.aot` compiles of layer_norm and geglu: typical calls of empty tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from perceiver_fast.kernels import geglu, layer_norm
from perceiver_fast.kernels.launch import Instance, Launch

ROWS = (64, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Dtypes of the stream and of the result, width, and whether a branch joins.
NORMS = (
    (BF16, BF16, 512, True),
    (FP32, BF16, 1024, True),
    (FP16, FP16, 2560, False),
    (FP32, FP32, 8192, True),
)
# Dtypes of h and of its bias, width of the result.
GATES = ((BF16, BF16, 2048), (FP16, FP32, 1024), (FP32, FP32, 2048))


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_launches(stream: torch.dtype, out: torch.dtype, width: int, branch: bool) -> list[Launch]:
    """Forward and backward of one LayerNorm."""
    x, z = empty(*ROWS, width, dtype=stream), empty(*ROWS, width, dtype=out)
    vector = empty(width, dtype=stream)
    joins = (z, vector) if branch else (None, None)
    _, _, mean, rstd, launches = layer_norm.forward_launches(x, *joins, vector, vector, 1e-5, out)
    return launches + layer_norm.backward_launches(x if branch else None, z, x, mean, rstd, vector, branch)[-1]


def gate_launches(dtype: torch.dtype, bias: torch.dtype, width: int) -> list[Launch]:
    """Forward and backward of one GEGLU."""
    h, vector = empty(*ROWS, 2 * width, dtype=dtype), empty(2 * width, dtype=bias)
    u, launches = geglu.forward_launches(h, vector)
    return launches + geglu.backward_launches(u, h, vector)[-1]


def instances(architecture: int) -> Iterator[Instance]:
    """Every kernel in every variant that these calls launch, and one in all of the one that adds up sums."""
    seen = set()
    calls = [(norm_launches, call) for call in NORMS] + [(gate_launches, call) for call in GATES]
    for launches, call in calls:
        dtypes = " and ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in call[:2]))
        for launch in launches(*call):
            sums = launch.kernel.__name__ == "column_sums_kernel"
            if not (sums and launch.kernel in seen):
                seen.add(launch.kernel)
                yield launch.instance(f"{dtypes}, {call[2]} wide", False)
