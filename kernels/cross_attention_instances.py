"""What :mod:`perceiver_fast.kernels.aot` compiles of attention: launches of typical calls, made of tensors without content."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from perceiver_fast.kernels.cross_attention import forward_launches
from perceiver_fast.kernels.cross_attention_backward import backward_launches
from perceiver_fast.kernels.launch import Instance

FEW, MANY = 512, 50176  # latents and tokens
# dtype, channels, and whether it is the call with a mask, with dropout, and of many queries to few tokens
CALLS = (
    (torch.bfloat16, 64, False),
    (torch.bfloat16, 64, True),
    (torch.bfloat16, 128, True),
    (torch.bfloat16, 261, False),
    (torch.bfloat16, 322, True),
    (torch.float16, 512, False),
    (torch.float32, 64, True),
    (torch.float32, 261, False),
)


def instances(architecture: int) -> Iterator[Instance]:
    """Every kernel in every variant that these calls launch, once."""
    seen = []
    for dtype, channels, options in CALLS:
        queries, tokens = (MANY, FEW) if options else (FEW, MANY)

        def rows(count):
            return torch.empty(2, 2, count, channels + -channels % 16, dtype=dtype, device="meta")[..., :channels]

        q, k, v, d_o = (rows(count) for count in (queries, tokens, tokens, queries))
        mask = torch.empty(2, tokens, dtype=torch.bool, device="meta") if options else None
        seed = torch.empty(1, dtype=torch.int64, device="meta") if options else None
        call = (q, k, v, mask, channels**-0.5, 0.1 if options else 0.0, seed)
        o, lse, launches = forward_launches(*call, architecture)
        launches += backward_launches(d_o, lse, *call, o, lse, architecture)[-1]
        name = f"{str(dtype).removeprefix('torch.')}, {channels} channels{', mask and dropout' if options else ''}"
        for launch in launches:
            instance = launch.instance(name, dtype != torch.float32)
            # One of every variant that holds weights; of the small kernels around them one in all.
            variant = (instance.kernel, instance.types, instance.constants) if instance.weights else instance.kernel
            if variant not in seen:
                seen.append(variant)
                yield instance
