"""The ops: functions of tensors with autograd, fake kernels for torch.compile, and a choice of backends."""

from perceiver_fast.ops import flops
from perceiver_fast.ops.cross_attention import cross_attention
from perceiver_fast.ops.feed_forward import feed_forward
from perceiver_fast.ops.fourier_projection import fourier_projection
from perceiver_fast.ops.geglu import geglu
from perceiver_fast.ops.grid_attention import grid_attention
from perceiver_fast.ops.grid_cross_attention import grid_cross_attention
from perceiver_fast.ops.grid_query_attention import grid_query_attention
from perceiver_fast.ops.grid_scale import grid_scale
from perceiver_fast.ops.latent_cross_attention import latent_cross_attention
from perceiver_fast.ops.latent_layers import latent_layers
from perceiver_fast.ops.layer_norm import add_layer_norm, layer_norm
from perceiver_fast.ops.layer_norm_linear import layer_norm_linear
from perceiver_fast.ops.linear import linear

__all__ = [
    "add_layer_norm",
    "cross_attention",
    "feed_forward",
    "fourier_projection",
    "geglu",
    "grid_attention",
    "grid_cross_attention",
    "grid_query_attention",
    "grid_scale",
    "latent_cross_attention",
    "latent_layers",
    "layer_norm",
    "layer_norm_linear",
    "linear",
]

flops.register_when_imported()
