"""One block: cross-attention to the tokens, then self-attention of the latents."""

from __future__ import annotations

from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.cross_attention import CrossAttention
from perceiver_fast.layers.feed_forward import FeedForward, PreNorm
from perceiver_fast.tokens import Tokens


class PerceiverBlock(nn.Module):
    """Cross-attention and feed-forward, then ``self_per_cross_attn`` times self-attention and feed-forward."""

    def __init__(
        self,
        *,
        dim: int,
        context_dim: int,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        self_per_cross_attn: int = 1,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ):
        super().__init__()
        self.cross_attn = CrossAttention(dim, context_dim, cross_heads, cross_dim_head, attn_dropout)
        self.cross_ff = PreNorm(dim, FeedForward(dim, dropout=ff_dropout))
        self.self_attns = nn.ModuleList(
            nn.ModuleList(
                [
                    PreNorm(dim, Attention(dim, heads=latent_heads, dim_head=latent_dim_head, dropout=attn_dropout)),
                    PreNorm(dim, FeedForward(dim, dropout=ff_dropout)),
                ]
            )
            for _ in range(self_per_cross_attn)
        )

    def forward(self, x: Tensor, tokens: Tokens, mask: Tensor | None = None, inverted: bool = False) -> Tensor:
        """Latents ``[B, N, D]`` (or ``[1, N, D]`` shared by the batch) to ``[B, N, D]``."""
        x = self.cross_attn(x, tokens, mask=mask, inverted=inverted) + x
        x = self.cross_ff(x) + x
        for self_attn, self_ff in self.self_attns:
            x = self_attn(x) + x
            x = self_ff(x) + x
        return x
