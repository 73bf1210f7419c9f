"""The Perceiver of perceiver-pytorch, on described tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor, nn

from perceiver_fast.layers import PerceiverBlock
from perceiver_fast.layers.pre_norm import keywords_for
from perceiver_fast.models.checkpoints import upgrade_state_dict
from perceiver_fast.models.grid import GridPerceiver
from perceiver_fast.models.stack import build_blocks, classifier_head, first_hiddens, run_blocks
from perceiver_fast.tokens import Stream


class Perceiver(GridPerceiver):
    """N latents that attend to M raw inputs in every block, then to each other.

    The arguments, the state_dict, the outputs and the gradients are perceiver-pytorch 0.11.0's; the same seed gives
    the same initial weights. Checkpoints of perceiver-pytorch 0.3 to 0.9 are renamed as they load. Derivatives of
    every order and torch.func transforms are right; those beyond the first run in plain PyTorch.

    What perceiver-pytorch does not have: ``model(data [B, M, F], coords=[B, M, A])`` takes tokens at arbitrary
    positions, point clouds for example. The positions of a grid, which need not be given, are evenly spaced in [-1, 1]
    along every axis; the codes of both have the same frequencies. Points without channels of their own are
    ``data [B, M, 0]`` with input_channels=0.

    Args:
        num_freq_bands: number of Fourier frequencies per axis, K.
        depth: number of blocks.
        max_freq: the highest frequency is max_freq / 2.
        input_channels: raw channels of a token. Default: 3.
        input_axis: number of axes of the input: 1 for audio, 2 for images, 3 for video. Default: 2.
        num_latents: number of latents, N. Default: 512.
        latent_dim: channels of a latent, D. Default: 512.
        cross_heads, latent_heads: heads of cross-attention and of self-attention. Default: 1 and 8.
        cross_dim_head, latent_dim_head: channels of a head. Default: 64.
        num_classes: size of the output. Default: 1000.
        attn_dropout, ff_dropout: dropout of attention weights and after feed-forwards, in training. Default: 0.
        weight_tie_layers: share the weights of all blocks but the first. Default: False.
        fourier_encode_data: encode positions; if False the input comes with its own encoding. Default: True.
        self_per_cross_attn: self-attentions a block. Default: 1.
        final_classifier_head: pool the latents and classify; else return them. Default: True.
        inverted_cross_attn: softmax over the latents, then normalised over the tokens: one bool, or one a block.
            Default: False.
        attn_residual: combine the outputs of all earlier blocks by learned attention. Default: False.
        attn_residual_rank: rank of its logits. Default: 64.
        checkpoint: in training, compute what is inside a block again in the backward rather than save it: less memory
            for about 40 % more time. It can be set later, too: ``model.checkpoint = True``. Default: False.

    Raises:
        ValueError: inverted_cross_attn is a sequence whose length is not depth.

    Source:
        Jaegle et al., "Perceiver: General perception with iterative attention", ICML 2021; perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast import Perceiver
        >>> model = Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, num_latents=8, latent_dim=16, num_classes=5)
        >>> model(torch.randn(2, 12, 10, 3)).shape
        torch.Size([2, 5])
        >>> model(torch.randn(2, 77, 3), coords=torch.rand(2, 77, 2) * 2 - 1).shape
        torch.Size([2, 5])
    """

    checkpoint = False

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
        self_per_cross_attn: int = 1,
        final_classifier_head: bool = True,
        inverted_cross_attn: bool | Sequence[bool] = False,
        attn_residual: bool = False,
        attn_residual_rank: int = 64,
        checkpoint: bool = False,
    ):
        super().__init__(
            num_freq_bands, max_freq, input_channels, input_axis, num_latents, latent_dim, fourier_encode_data
        )
        self.has_attn_residual = attn_residual
        self.checkpoint = checkpoint
        if isinstance(inverted_cross_attn, bool):
            inverted_cross_attn = (inverted_cross_attn,) * depth
        self.inverted_cross_attn = tuple(inverted_cross_attn)
        if len(self.inverted_cross_attn) != depth:
            raise ValueError(
                f"inverted_cross_attn: expected one bool, or {depth} of them for depth={depth}, "
                f"got {len(self.inverted_cross_attn)}"
            )

        self.layers, self.attn_residuals = build_blocks(
            depth,
            1 if weight_tie_layers else None,
            attn_residual_rank if attn_residual else None,
            dim=latent_dim,
            context_dim=self.input_dim,
            cross_heads=cross_heads,
            latent_heads=latent_heads,
            cross_dim_head=cross_dim_head,
            latent_dim_head=latent_dim_head,
            self_per_cross_attn=self_per_cross_attn,
            attn_dropout=attn_dropout,
            ff_dropout=ff_dropout,
        )
        self.to_logits = classifier_head(latent_dim, num_classes) if final_classifier_head else nn.Identity()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        upgrade_state_dict(self, state_dict, prefix)  # before the submodules look up their keys
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @overload
    def forward(
        self,
        data: Tensor | Stream,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: Literal[False] = False,
        *,
        coords: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        data: Tensor | Stream,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        *,
        return_hiddens: Literal[True],
        coords: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward(
        self,
        data: Tensor | Stream,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: bool = False,
        *,
        coords: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        data: Tensor | Stream,
        mask: Tensor | None = None,
        return_embeddings: bool = False,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: bool = False,
        *,
        coords: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor] | None]:
        """Classify, or embed.

        Args:
            data: ``[B, n_1, .., n_A, input_channels]``, the dtype and device of the parameters; with coords
                ``[B, M, input_channels]``. Or a :func:`perceiver_fast.stream`, which is read in chunks.
            mask: bool, ``[B, M]`` or ``[B, n_1, .., n_A]``, True where a token may be attended to. A row that is all
                False attends uniformly to all tokens, as in perceiver-pytorch. Default: all True.
            return_embeddings: return the latents ``[B, N, D]`` in place of the logits. Default: False.
            block_outputs: outputs of earlier blocks, for the attention residual. Default: the initial latents.
            return_hiddens: also return the outputs of all blocks. Default: False.
            coords: positions ``[B, M, A]``, or ``[M, A]`` when the whole batch shares them, A = input_axis; floating
                point, and computed with in float64. Gradients reach them. Default: data is on a grid.

        Returns:
            Logits ``[B, num_classes]`` or latents ``[B, N, D]``; with return_hiddens, a tuple of that and the list
            of block outputs, each ``[B, N, D]``.

        Raises:
            TypeError, ValueError: wrong dtype, rank, channels, size, mask or device; the message says expected, got
                and what to do.
            perceiver_fast.backends.BackendError: a forced backend cannot run a layer.
        """
        tokens, mask = self.tokens_of(data, mask, coords)
        x = self.latents.unsqueeze(0).expand(tokens.batch, -1, -1)
        hiddens = first_hiddens(x, block_outputs, return_hiddens or self.has_attn_residual)
        arguments = (
            keywords_for(block, PerceiverBlock, dict(context=tokens, mask=mask, inverted_attention=inverted))
            for block, inverted in zip(self.layers, self.inverted_cross_attn)
        )
        x = run_blocks(x, self.layers, self.attn_residuals, hiddens, arguments, self.checkpoint)
        out = x if return_embeddings else self.to_logits(x)
        return (out, hiddens) if return_hiddens else out

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
