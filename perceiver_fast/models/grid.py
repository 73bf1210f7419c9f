"""What models of input on a grid share: latents, description and checks of the input, pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers.checks import check_data, check_mask
from perceiver_fast.models.inputs import check_coords, check_width, context_channels, like
from perceiver_fast.models.parts import read_parts
from perceiver_fast.models.stack import Head, are_shared, build_layers, run_checkpointed
from perceiver_fast.ops.rounding import rounding_once
from perceiver_fast.ranges import op_range
from perceiver_fast.tokens import DenseTokens, Stream, Tokens, TokenStream
from perceiver_fast.tokens.describe import describe_grid, describe_points
from perceiver_fast.tracing import own, trainable

if TYPE_CHECKING:
    from perceiver_fast.shards.agreement import Place
    from perceiver_fast.shards.shard import Shard


class GridPerceiver(nn.Module):
    """Base class of models of one input on a grid or at positions: N latents, and a description of the input's tokens.

    Args:
        num_freq_bands, max_freq, input_channels, input_axis, num_latents, latent_dim, fourier_encode_data: see
            :class:`perceiver_fast.Perceiver`.
    """

    shard: Shard | None = None  # set by perceiver_fast.distributed.shard

    def __init__(
        self,
        num_freq_bands: int,
        max_freq: float,
        input_channels: int,
        input_axis: int,
        num_latents: int,
        latent_dim: int,
        fourier_encode_data: bool = True,
    ):
        super().__init__()
        self.input_axis = input_axis
        self.max_freq = max_freq
        self.num_freq_bands = num_freq_bands
        self.fourier_encode_data = fourier_encode_data
        self.input_channels = input_channels
        self.input_dim = input_channels + self._code_channels()
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "input_dim" not in self.__dict__:  # pickled by perceiver-pytorch
            self.__dict__.setdefault("fourier_encode_data", True)
            channels: Any = context_channels(self)  # its norms say
            self.input_dim = channels
            self.input_channels = self.input_dim - self._code_channels()

    def _code_channels(self) -> int:
        """Channels of a token's position code; 0 if positions are not encoded."""
        return self.input_axis * (2 * self.num_freq_bands + 1) if self.fourier_encode_data else 0

    def check_inputs(self, data: Tensor, mask: Tensor | None, coords: Tensor | None = None) -> Tensor | None:
        """Check ``data``, ``mask`` and ``coords``, as the forward takes them.

        Returns:
            The mask; a copy where gradients are recorded, since the backward needs it and the caller may change it.

        Raises:
            TypeError, ValueError: the message says expected, got and what to do.
        """
        who = type(self).__name__
        if coords is not None and not self.fourier_encode_data:
            raise ValueError(
                f"{who}: expected no coords with fourier_encode_data=False, got coords; put the positions into data, "
                "or build the model with fourier_encode_data=True"
            )
        grid = dict(axes=self.input_axis, axes_argument="input_axis") if coords is None else dict(axes=1)
        channels = self.input_channels
        if isinstance(data, Tensor) and data.dim() > 0 and data.shape[-1] != channels:
            width = context_channels(self)
            channels = check_width(channels, data.shape[-1], None if width is None else width - self._code_channels())
        check_data(who, "data", data, like(self), channels=channels, channels_argument="input_channels", **grid)
        if coords is not None:
            check_coords(who, "coords", coords, data, self.input_axis)
        mask = check_mask(who, mask, "data", data, data.shape[1:-1])
        return None if mask is None else own(mask)

    def tokens_of(
        self, data: Tensor | Stream, mask: Tensor | None, coords: Tensor | None = None
    ) -> tuple[Tokens | TokenStream, Tensor | None]:
        """The checked and described tokens of ``data``, and their mask, for what the forward takes."""
        if self.shard is not None or isinstance(data, Stream):
            return read_parts(self, data, mask, coords)
        mask = self.check_inputs(data, mask, coords)
        return self.describe(data, coords), mask

    @op_range("describe")
    def describe(self, data: Tensor, coords: Tensor | None = None, place: Place | None = None) -> Tokens:
        """The tokens of ``data``, shared by all cross-attention layers of one forward.

        Args:
            data: ``[B, n_1, .., n_A, input_channels]``, or with coords ``[B, M, input_channels]``.
            coords: positions ``[B, M, A]`` or ``[M, A]``. Default: a grid.
            place: of these rows among all, where they are a part of an input. Default: they are all.
        """
        if not self.fourier_encode_data:
            return DenseTokens(trainable(data).flatten(1, -2))
        if coords is not None:
            return describe_points(data, coords, self.num_freq_bands, self.max_freq)
        return describe_grid(data, self.num_freq_bands, self.max_freq, place=place)


class PooledPerceiver(GridPerceiver):
    """Base class of the variants: layers one after the other, then the mean of the latents through the head.

    A subclass calls :meth:`build_stack` in its constructor, and defines :meth:`run_layer`.
    """

    checkpoint: bool = False

    def build_stack(
        self,
        layer: Callable[[], nn.ModuleList],
        depth: int,
        weight_tie_layers: bool,
        num_classes: int,
        checkpoint: bool,
    ) -> None:
        """Add the layers and the head to the model.

        Args:
            layer: makes one layer.
            depth, weight_tie_layers, num_classes, checkpoint: see :class:`perceiver_fast.Perceiver`.
        """
        self.checkpoint = checkpoint
        self.layers = nn.ModuleList(build_layers(layer, depth, shared=1 if weight_tie_layers else None))
        latent_dim = self.latents.shape[1]
        self.to_logits = Head(nn.LayerNorm(latent_dim), nn.Linear(latent_dim, num_classes))

    def run_layer(
        self, index: int, x: Tensor, tokens: Tokens | TokenStream, mask: Tensor | None
    ) -> tuple[Tensor, Tokens | TokenStream]:
        """One layer.

        Args:
            index: of the layer.
            x: latents ``[B, N, D]``.
            tokens: what the latents attend to.
            mask: bool ``[B, M]`` or ``[B, n_1, .., n_A]``, True where a token may be attended to; or None.

        Returns:
            The latents, and the tokens for the next layer.
        """
        raise NotImplementedError

    def forward(self, data: Tensor | Stream, mask: Tensor | None = None, *, coords: Tensor | None = None) -> Tensor:
        """Classify.

        Args:
            data, mask, coords: as those of :meth:`perceiver_fast.Perceiver.forward`.

        Returns:
            Logits ``[B, num_classes]``.

        Raises:
            TypeError, ValueError, perceiver_fast.backends.BackendError: as there.
        """
        tokens, mask = self.tokens_of(data, mask, coords)
        x = self.latents.unsqueeze(0).expand(tokens.batch, -1, -1)
        with rounding_once(x.device, shared=are_shared(self.layers)):
            for index in range(len(self.layers)):
                x, tokens = run_checkpointed(self.run_layer, self.checkpoint, index, x, tokens, mask)
        return self.to_logits(x.mean(dim=-2))

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
