"""The gated variant of perceiver-pytorch: GRU cells in place of the residual connections around attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from perceiver_fast.layers import Attention, FeedForward, GRUGating, PreNorm, Residual
from perceiver_fast.layers.pre_norm import keywords_for
from perceiver_fast.models.grid import PooledPerceiver
from perceiver_fast.tokens import Tokens, TokenStream


class Perceiver(PooledPerceiver):
    """A Perceiver whose attention outputs enter the latents through GRU cells.

    The arguments, the state_dict, the outputs and the gradients are those of ``perceiver_pytorch.gated.Perceiver``
    0.11.0; the same seed gives the same initial weights. Positions are computed in float64, perceiver-pytorch's in float32.

    Args:
        num_freq_bands, depth, max_freq, input_channels, input_axis, num_latents, latent_dim, cross_heads, latent_heads,
            cross_dim_head, latent_dim_head, num_classes, attn_dropout, ff_dropout, weight_tie_layers,
            checkpoint: as those of :class:`perceiver_fast.Perceiver`.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.gated import Perceiver
        >>> model = Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16, num_classes=5)
        >>> model(torch.randn(2, 12, 10, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        *,
        num_freq_bands: int,
        depth: int,
        max_freq: float,
        input_channels: int = 3,
        input_axis: int = 2,
        num_latents: int = 512,
        latent_dim: int = 512,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        num_classes: int = 1000,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        weight_tie_layers: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__(num_freq_bands, max_freq, input_channels, input_axis, num_latents, latent_dim)

        def layer() -> nn.ModuleList:
            attention = Attention(latent_dim, self.input_dim, cross_heads, cross_dim_head, attn_dropout)
            cross_attn = GRUGating(latent_dim, PreNorm(latent_dim, attention, context_dim=self.input_dim))
            cross_ff = Residual(PreNorm(latent_dim, FeedForward(latent_dim, dropout=ff_dropout)))
            attention = Attention(latent_dim, heads=latent_heads, dim_head=latent_dim_head, dropout=attn_dropout)
            latent_attn = GRUGating(latent_dim, PreNorm(latent_dim, attention))
            latent_ff = Residual(PreNorm(latent_dim, FeedForward(latent_dim, dropout=ff_dropout)))
            return nn.ModuleList([cross_attn, cross_ff, latent_attn, latent_ff])

        self.build_stack(layer, depth, weight_tie_layers, num_classes, checkpoint)

    def run_layer(
        self, index: int, x: Tensor, tokens: Tokens | TokenStream, mask: Tensor | None
    ) -> tuple[Tensor, Tokens | TokenStream]:
        layer: Any = self.layers[index]
        cross_attn, cross_ff, latent_attn, latent_ff = layer
        x = cross_attn(x, **keywords_for(cross_attn, GRUGating, dict(context=tokens, mask=mask)))
        return latent_ff(latent_attn(cross_ff(x))), tokens
