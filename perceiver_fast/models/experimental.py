"""The experimental variant of perceiver-pytorch: tokens attend, too, to each other and to the latents."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from perceiver_fast.layers import Attention, FeedForward, LinearAttention, PreNorm
from perceiver_fast.layers.fusing import is_plain, is_watched
from perceiver_fast.layers.pre_norm import add_cross_attention, add_layer
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.models.grid import PooledPerceiver
from perceiver_fast.ops.fourier_projection import fourier_projection_unchecked
from perceiver_fast.ops.library import autocast_dtype, unless_autocast
from perceiver_fast.ranges import op_range
from perceiver_fast.shards.shard import calling
from perceiver_fast.tokens import DenseTokens, GridTokens, PointTokens, Tokens, TokenStream

if TYPE_CHECKING:
    from perceiver_fast.shards.agreement import Place


def project_points(tokens: PointTokens, linear: nn.Linear) -> Tensor:
    """``linear`` of described points ``[B, M, C']``, without building the tokens or their position codes."""
    return fourier_projection_unchecked(tokens.feat, tokens.coords, tokens.frequencies, linear.weight.T, linear.bias)


def project_grid(tokens: GridTokens, linear: nn.Linear) -> Tensor:
    """``linear`` of a described grid's tokens ``[B, M, C']``, without building the tokens: a sum over raw channels and axes."""
    feat, codes = tokens.feat, [axis.code for axis in tokens.codes]
    with unless_autocast(feat.device):
        weight = linear.weight.to(feat.dtype).split([tokens.features, *(code.shape[-1] for code in codes)], dim=1)
        out = feat @ weight[0].T + linear.bias.to(feat.dtype)
        for axis, (code, columns) in enumerate(zip(codes, weight[1:])):
            out = out + (code @ columns.T).view(*(-1 if a == axis else 1 for a in range(len(codes))), out.shape[-1])
    return out.flatten(1, -2).to(autocast_dtype(out.device) or linear.weight.dtype)


class Perceiver(PooledPerceiver):
    """A Perceiver that rewrites its input: between blocks, tokens attend to each other and to the latents.

    With ``fourier_encode_data=False`` the arguments, the state_dict, the outputs and the gradients are those of
    ``perceiver_pytorch.experimental.Perceiver`` 0.11.0; the same seed gives the same initial weights. With the default,
    True, perceiver-pytorch counts input_channels twice and raises an error. Here layers have the width of the encoded
    input, and the model is perceiver-pytorch's on input that was encoded before. A mask with a depth above one is nearly
    always an error in perceiver-pytorch; here it leaves masked tokens out of all attention. Since tokens are rewritten
    they have to be built: in inference they take memory of about 1,000 numbers a token.

    Args:
        num_freq_bands, depth, max_freq, input_channels, input_axis, num_latents, latent_dim, cross_heads, latent_heads,
            cross_dim_head, latent_dim_head, num_classes, attn_dropout, ff_dropout, weight_tie_layers,
            fourier_encode_data, checkpoint: as those of :class:`perceiver_fast.Perceiver`.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.experimental import Perceiver
        >>> model = Perceiver(num_freq_bands=6, depth=2, max_freq=10.0, num_latents=8, latent_dim=16, num_classes=5)
        >>> model(torch.randn(2, 12, 10, 3)).shape
        torch.Size([2, 5])
    """

    takes_empty_parts = False  # of a sharded input: layers are called on the tokens

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
        fourier_encode_data: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__(
            num_freq_bands, max_freq, input_channels, input_axis, num_latents, latent_dim, fourier_encode_data
        )
        width = self.input_dim
        self.data_proj = nn.Linear(width, width)

        def cross_attention(dim: int, context_dim: int) -> PreNorm:
            attention = Attention(dim, context_dim, cross_heads, cross_dim_head, attn_dropout)
            return PreNorm(dim, attention, context_dim=context_dim)

        def feed_forward(dim: int) -> PreNorm:
            return PreNorm(dim, FeedForward(dim, dropout=ff_dropout))

        def layer() -> nn.ModuleList:
            cross_attn, cross_ff = cross_attention(latent_dim, width), feed_forward(latent_dim)
            rev_cross_attn, rev_cross_ff = cross_attention(width, latent_dim), feed_forward(width)
            input_attn = PreNorm(width, LinearAttention(width, dropout=attn_dropout))
            attention = Attention(latent_dim, heads=latent_heads, dim_head=latent_dim_head, dropout=attn_dropout)
            latent_attn, latent_ff = PreNorm(latent_dim, attention), feed_forward(latent_dim)
            return nn.ModuleList(
                [cross_attn, cross_ff, rev_cross_attn, rev_cross_ff, input_attn, latent_attn, latent_ff]
            )

        self.build_stack(layer, depth, weight_tie_layers, num_classes, checkpoint)

    @op_range("describe")
    def describe(self, data: Tensor, coords: Tensor | None = None, place: Place | None = None) -> Tokens:
        """The tokens that the first layer attends to: projected by ``data_proj``, so they exist as a tensor.

        Args:
            data, coords, place: see :meth:`GridPerceiver.describe`.
        """
        with nullcontext() if self.shard is None else self.shard.local_parameters(self.data_proj):
            return self._projected(super().describe(data, coords, place))

    def _projected(self, tokens: Tokens) -> DenseTokens:
        """``data_proj`` of the tokens."""
        linear = self.data_proj
        if not is_watched(*tokens.sources()) and is_plain(linear, nn.Linear) and linear.bias is not None:
            if isinstance(tokens, GridTokens):
                return DenseTokens(project_grid(tokens, linear))
            if isinstance(tokens, PointTokens):
                return DenseTokens(project_points(tokens, linear))
        return DenseTokens(linear(tokens.tensor()))

    def run_layer(
        self, index: int, x: Tensor, tokens: Tokens | TokenStream, mask: Tensor | None
    ) -> tuple[Tensor, Tokens | TokenStream]:
        if isinstance(tokens, TokenStream):
            raise ValueError(f"{type(self).__name__}: expected a tensor, got a stream; this model rewrites its tokens")
        layer: Any = self.layers[index]
        cross_attn, cross_ff, rev_cross_attn, rev_cross_ff, input_attn, latent_attn, latent_ff = layer
        stream, watched, who = ResidualStream(x), is_watched(x), type(self).__name__
        add_cross_attention(stream, cross_attn, watched, who, context=tokens, mask=mask)
        add_layer(stream, cross_ff, watched)
        if index < len(self.layers) - 1:  # after the last layer nothing reads the tokens
            data, latents, shard, before = ResidualStream(tokens.feat), stream.value(), tokens.shard, tokens
            drops = any(m.training and m.p > 0 for m in self.modules() if isinstance(m, nn.Dropout))
            if shard is not None and drops:
                raise ValueError(
                    f"{who}: expected no dropout in training on sharded tokens, whose own rewriting would draw random "
                    "numbers that the other processes do not; build the model with attn_dropout=0 and ff_dropout=0"
                )
            with ExitStack() as stack:
                if shard is not None:  # what rewrites own tokens alone gets a part of its gradient
                    stack.enter_context(shard.local_parameters(input_attn, rev_cross_attn, rev_cross_ff))
                    (latents,) = shard.local(latents)
                with nullcontext() if shard is None else calling(shard, None, input_attn) as called:
                    add_layer(data, input_attn, watched, mask=mask)
                if called is not None and not called.asked:
                    raise RuntimeError(
                        f"shard: expected the package's own LinearAttention, got {type(input_attn).__name__}"
                    )
                add_cross_attention(data, rev_cross_attn, watched, who, context=latents)
                add_layer(data, rev_cross_ff, watched)
            tokens = DenseTokens(data.value())
            tokens.shard, tokens.first = before.shard, before.first
        add_layer(stream, latent_attn, watched)
        add_layer(stream, latent_ff, watched)
        return stream.value(), tokens
