"""Models and inputs that have shapes and no content: any size on any device, in no memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


def shapes_mode(*values: Any) -> FakeTensorMode:
    """The mode that runs tensors without content: that of the first one in ``values``, or a new one."""
    found = (leaf.fake_mode for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor))
    return next(found, None) or FakeTensorMode(allow_non_fake_inputs=True)


def on_shapes(
    build: Callable[[], nn.Module], size: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[nn.Module, Tensor]:
    """A model and its input without content, to be looked at by :func:`perceiver_fast.explain`.

    Args:
        build: makes the model.
        size: of the input.
        dtype, device: of both; the device need not be there.

    Returns:
        The model and the input. Both are of one thread at a time, as all that torch runs on shapes alone.

    Example:
        >>> import perceiver_fast as pf
        >>> from perceiver_fast.insight.shapes import on_shapes
        >>> build = lambda: pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> print(pf.explain(*on_shapes(build, (1, 4096, 4096, 3))).tokens)
        4 latents of 8 channels; 4096 x 4096 tokens of 13 channels; batch 1
    """
    with torch.device("meta"):
        model, data = build().to(dtype), torch.empty(*size, dtype=dtype)
    mode, where = FakeTensorMode(allow_non_fake_inputs=True), torch.device(device)

    @functools.cache  # a shared one stays one
    def without_content(tensor: Tensor) -> Tensor:
        fake = FakeTensor(mode, tensor.detach(), where)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    for module in model.modules():
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in list(tensors(recurse=False, remove_duplicate=False)):
                setattr(module, name, without_content(tensor))
    return model, without_content(data)
