"""Every op in plain PyTorch, for any dtype and device. In float64 this is the ground truth that kernels are tested by."""

from perceiver_fast.reference.cross_attention import cross_attention
from perceiver_fast.reference.dropout import apply_dropout, dropout_keep
from perceiver_fast.reference.fourier_projection import fourier_encode, fourier_projection
from perceiver_fast.reference.geglu import geglu
from perceiver_fast.reference.grid_attention import grid_attention, grid_logits
from perceiver_fast.reference.grid_cross_attention import grid_cross_attention
from perceiver_fast.reference.grid_query_attention import grid_query_attention
from perceiver_fast.reference.grid_scale import grid_scale
from perceiver_fast.reference.latent_cross_attention import latent_cross_attention
from perceiver_fast.reference.latent_layers import latent_layers
from perceiver_fast.reference.layer_norm import add_layer_norm, smooth_layer_norm
from perceiver_fast.reference.layer_norm_linear import layer_norm_linear

__all__ = [
    "add_layer_norm",
    "apply_dropout",
    "cross_attention",
    "dropout_keep",
    "fourier_encode",
    "fourier_projection",
    "geglu",
    "grid_attention",
    "grid_cross_attention",
    "grid_logits",
    "grid_query_attention",
    "grid_scale",
    "latent_cross_attention",
    "latent_layers",
    "layer_norm_linear",
    "smooth_layer_norm",
]
