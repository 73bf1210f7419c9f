"""One block: cross-attention to the tokens, then self-attention of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.described import describe_keywords
from perceiver_fast.layers.feed_forward import FeedForward
from perceiver_fast.layers.fusing import fusable, is_watched
from perceiver_fast.layers.latent_layers import add_layers
from perceiver_fast.layers.pre_norm import PreNorm, add_cross_attention
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.ranges import layer_range
from perceiver_fast.tokens import Description, TokenGroups, Tokens
from perceiver_fast.tracing import trainable


@fusable
class PerceiverBlock(nn.Module):
    """Cross-attention and feed-forward, then ``self_per_cross_attn`` times self-attention and feed-forward.

    Args:
        dim: channels of the latents, D.
        context_dim: channels of what is attended to, C. Default: dim.
        cross_heads, latent_heads: heads of cross-attention and of self-attention. Default: 1 and 8.
        cross_dim_head, latent_dim_head: channels of a head. Default: 64.
        self_per_cross_attn: self-attentions after the cross-attention. Default: 1.
        attn_dropout, ff_dropout: dropout of attention weights and after feed-forwards, in training. Default: 0.
        has_cross_attn: if False the block is its self-attentions alone. Default: True.
        queries_contribute_kv: attend to the latents, too, before the context; needs context_dim == dim. Default: False.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast import PerceiverBlock
        >>> block = PerceiverBlock(dim=16, context_dim=9)
        >>> block(torch.randn(2, 8, 16), torch.randn(2, 30, 9)).shape
        torch.Size([2, 8, 16])
    """

    def __init__(
        self,
        *,
        dim: int,
        context_dim: int | None = None,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        self_per_cross_attn: int = 1,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        has_cross_attn: bool = True,
        queries_contribute_kv: bool = False,
    ):
        super().__init__()
        self.has_cross_attn = has_cross_attn
        self.cross_attn = self.cross_ff = None
        if has_cross_attn:
            context_dim = dim if context_dim is None else context_dim
            cross_attn = Attention(dim, context_dim, cross_heads, cross_dim_head, attn_dropout, queries_contribute_kv)
            self.cross_attn = PreNorm(dim, cross_attn, context_dim=context_dim)
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

    @layer_range
    def forward(
        self,
        x: Tensor,
        context: Tensor | Description | Tokens | TokenGroups | None = None,
        mask: Tensor | None = None,
        inverted_attention: bool = False,
    ) -> Tensor:
        """Attend to ``context``, then to ``x`` itself.

        Args:
            x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them.
            context: what is attended to, ``[B, M, C]``, or a description of it by :func:`perceiver_fast.grid_tokens` or
                :func:`perceiver_fast.point_tokens`. Without cross-attention: ignored. (The models of this package pass
                one of their own if nobody but this forward sees it.)
            mask: bool ``[B, M]`` or ``[B, ..]`` of M elements, True where a token may be attended to. Default: all.
            inverted_attention: softmax over the latents, then normalised over the tokens. Default: False.

        Returns:
            ``[B, N, D]``.

        Raises:
            TypeError, ValueError: a context tensor, or x or mask beside one, of wrong dtype, rank, size or device;
                the message says expected, got and what to do.
        """
        watched = is_watched(x)
        modules: dict[str, Any] = self._modules
        if not self.has_cross_attn:
            stream = ResidualStream(trainable(x))
        else:
            if context is None:
                raise ValueError(
                    f"{type(self).__name__}: expected context [batch, n_1, channels] to attend to, got None; "
                    "give it, or build the block with has_cross_attn=False"
                )
            keywords: dict[str, Any] = dict(context=context, mask=mask, inverted_attention=inverted_attention)
            if isinstance(context, Description):
                keywords = describe_keywords(type(self).__name__, modules["cross_attn"], x, keywords)
                context = keywords["context"]
            batch = context.shape[0] if isinstance(context, Tensor) else context.batch
            stream = ResidualStream(trainable(x), batch)
            add_cross_attention(stream, modules["cross_attn"], watched, type(self).__name__, **keywords)
        layers = [modules["cross_ff"]] if self.has_cross_attn else []
        for pair in modules["self_attns"]:
            layers += pair
        add_layers(stream, layers, watched)
        return stream.value()

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
