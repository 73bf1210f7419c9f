"""The ops: functions of tensors with autograd, fake kernels for torch.compile, and a choice of backends."""

from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.fourier_projection import fourier_projection
from perceiver_fast.ops.grid_attention import grid_attention
from perceiver_fast.ops.grid_scale import grid_scale

__all__ = ["cross_attention", "fourier_projection", "grid_attention", "grid_scale"]
