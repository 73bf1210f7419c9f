"""What :mod:`perceiver_fast.kernels.aot` compiles of grid attention: launches of typical calls, of tensors without content."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from perceiver_fast.kernels.grid_attention import forward_launches
from perceiver_fast.kernels.grid_attention_backward import backward_launches
from perceiver_fast.kernels.launch import Instance

BATCH, QUERIES, SIZES = 2, 512, (224, 224)
# dtype, channels, and whether it is the call with a mask and dropout
CALLS = (
    (torch.float32, 3, False),
    (torch.float32, 3, True),
    (torch.float32, 8, True),
    (torch.float32, 16, False),
    (torch.float32, 64, False),
    (torch.bfloat16, 3, False),
    (torch.bfloat16, 3, True),
    (torch.bfloat16, 64, False),
    (torch.float16, 3, False),
    (torch.float16, 3, True),
    (torch.float16, 64, False),
)


def instances(architecture: int) -> Iterator[Instance]:
    """Every kernel in every variant that these calls launch, once."""
    seen = []
    for dtype, features, options in CALLS:
        q = torch.empty(BATCH, QUERIES, features + sum(SIZES), device="meta")
        feat = torch.empty(BATCH, *SIZES, features, dtype=dtype, device="meta")
        scale = torch.empty(BATCH, *SIZES, device="meta")
        mask = torch.empty(BATCH, *SIZES, dtype=torch.uint8, device="meta") if options else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if options else None
        dropout = 0.1 if options else 0.0
        call = (q, feat, scale, mask, dropout, seed)
        o, lse, kept, launches = forward_launches(*call, architecture)
        grads = (torch.empty_like(o), lse if options else None, kept if options else None)
        launches += backward_launches(*grads, *call, o, o, lse, kept, True, architecture)[-1]
        name = f"{str(dtype).removeprefix('torch.')}, {features} channels{', mask and dropout' if options else ''}"
        for launch in launches:
            precision = launch.arguments.get("PRECISION")
            instance = launch.instance(name, tensor_cores=precision in ("bf16", "tf32"))
            # One of every variant that holds weights; of the small kernels around them one for a number of channels.
            whole = (instance.kernel, instance.types, instance.constants)
            variant = whole if instance.weights else (instance.kernel, features)
            if variant not in seen:
                seen.append(variant)
                yield instance
