"""Fourier codes of transformers' Perceiver, one axis of a grid at a time.

The code of a grid's point is a code of its place along every axis, so that ``n_1 + .. + n_A`` of them say all ``n_1 x ..
x n_A``. They are transformers' own numbers: its module is asked for the points of one line along every axis. They
depend on sizes, frequencies and dtype alone, and are kept.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_fast.adapters.hugging_face import is_perceivers, modeling
from perceiver_fast.layers.fusing import is_called
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.tokens import GridTokens
from perceiver_fast.tokens.fourier import AxisCodes

_MOST = 32
_kept: dict[tuple, tuple[tuple[AxisCodes, ...], Tensor]] = {}


def why_codes(encoding: Any, projection: nn.Module | None, axes: int) -> str | None:
    """Why position codes have to be built, in words; None if :func:`grid_codes` says them for a grid of so many axes."""
    if encoding is None or not is_perceivers(encoding, "PerceiverFourierPositionEncoding"):
        return f"positions are of class {type(encoding).__name__}"
    found = is_called(encoding)
    if found is not None:
        return f"position_embeddings {found}"
    if type(projection) is not nn.Identity or is_called(projection) is not None:
        return "positions are projected"
    if not encoding.concat_pos:
        return "positions are not among their codes, which transformers then returns without a batch"
    if len(encoding.max_resolution) != axes or axes == 0:
        return f"a grid of {axes} axes has positions of {len(encoding.max_resolution)}"
    return None


def grid_codes(
    encoding: Any, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[AxisCodes, ...], Tensor]:
    """The codes of every axis, and where each channel of transformers' code stands among them.

    Args:
        encoding: a ``PerceiverFourierPositionEncoding``, for which :func:`why_codes` is None.
        sizes: of the grid.
        dtype: of transformers' codes, which are rounded to it.
        device: of the codes.

    Returns:
        One :class:`AxisCodes` an axis, float32, or float64 for float64; and int64 ``[C]``.
    """
    options = encoding.num_bands, tuple(encoding.max_resolution), encoding.sine_only
    key = (*options, sizes, dtype, device, modeling().generate_fourier_features)
    if key not in _kept:
        with torch.inference_mode(False), torch.no_grad():
            found = _compute(encoding, sizes, dtype, device)
        while len(_kept) >= _MOST:
            _kept.pop(next(iter(_kept)))
        _kept[key] = found
    return _kept[key]


def _compute(encoding, sizes, dtype, device) -> tuple[tuple[AxisCodes, ...], Tensor]:
    axes, bands = len(sizes), encoding.num_bands
    owners = list(range(axes))
    for _ in range(1 if encoding.sine_only else 2):
        owners += [axis for axis in range(axes) for _ in range(bands)]
    owner = torch.tensor(owners, device=device)
    codes = []
    for axis, size in enumerate(sizes):
        line = _positions([size if a == axis else 1 for a in range(axes)], device)
        code = encoding(sizes, 1, device=device, dtype=dtype, pos=line.reshape(1, size, axes))[0]
        code = code[:, owner == axis].double().cpu()
        mean = code.mean(1)
        square = (code - mean.unsqueeze(1)).square().sum(1)
        codes.append(AxisCodes(*(t.to(device, compute_dtype(dtype)) for t in (code, mean, square))))
    return tuple(codes), owner.argsort(stable=True).argsort()


def _positions(sizes: list[int], device: torch.device) -> Tensor:
    """transformers' positions of a grid, ``[*sizes, A]``; older ones make them on the CPU."""
    build = modeling().build_linear_positions
    known = {"device": device} if "device" in inspect.signature(build).parameters else {}
    return build(sizes, **known).to(device)


def grid_tokens(encoding: nn.Module, inputs: Tensor) -> GridTokens:
    """The tokens ``[inputs ; codes]`` of ``inputs [B, *sizes, F]``."""
    codes, order = grid_codes(encoding, tuple(inputs.shape[1:-1]), inputs.dtype, inputs.device)
    tokens = GridTokens(inputs, codes)
    features = inputs.shape[-1]
    tokens.order = torch.cat([torch.arange(features, device=inputs.device), features + order])
    return tokens
