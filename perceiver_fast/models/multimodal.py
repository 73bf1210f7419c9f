"""Several modalities into one Perceiver: each on its own grid, or at its own positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers import PerceiverBlock
from perceiver_fast.layers.pre_norm import keywords_for
from perceiver_fast.models.inputs import like
from perceiver_fast.models.modality import Modality, ModalityInput, check_modalities, check_modality_inputs
from perceiver_fast.models.modality_parts import describe_modality, read_modalities
from perceiver_fast.models.stack import build_blocks, classifier_head, run_blocks
from perceiver_fast.ranges import op_range
from perceiver_fast.tokens import Stream, TokenGroups

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard


class ModalityEmbeddings(nn.ParameterDict):
    """The modalities' embeddings by name.

    It is called like a layer, since libraries that keep parameters elsewhere (offloading, sharding) bring those of a
    module back when the module is called.
    """

    __call__ = nn.Module.__call__  # nn.ParameterDict forbids calls

    def forward(self, name: str) -> Tensor:
        """The embedding of modality ``name``, ``[E]``."""
        return self[name]


class MultimodalPerceiver(nn.Module):
    """A Perceiver whose latents attend to the tokens of several modalities at once, in every block.

    Modalities have positions and frequencies of their own, and a token of modality g is ``[x ; embedding_g ; Fourier
    code]``. The learned embedding says which modality the token is of, and fills it up to the common number of channels:
    those of the widest modality and ``modality_channels``. One softmax runs over the tokens of all modalities, but
    attention runs modality by modality, each on the way that suits it, and the results are merged exactly: no token is
    built, padded or joined.

    Args:
        modalities: at least one :class:`Modality`, of different names.
        depth: number of blocks.
        modality_channels: the least size of a modality's embedding. Default: 4.
        num_latents, latent_dim, cross_heads, latent_heads, cross_dim_head, latent_dim_head, num_classes, attn_dropout,
            ff_dropout, weight_tie_layers, self_per_cross_attn, final_classifier_head, checkpoint: as those of
            :class:`perceiver_fast.Perceiver`, with the same defaults.

    Raises:
        TypeError, ValueError: no modality, two of one name, or a modality_channels that makes no embedding.

    Source:
        Jaegle et al., "Perceiver: General perception with iterative attention", ICML 2021, sec. 4.2 (audio and video,
        fused at the input by a learned encoding of the modality); embeddings that fill tokens up to a common number of
        channels, and their initialisation, as in Jaegle et al., "Perceiver IO", ICLR 2022.

    Example:
        >>> import torch
        >>> from perceiver_fast import Modality, MultimodalPerceiver
        >>> video = Modality("video", input_channels=3, input_axis=3, num_freq_bands=4, max_freq=8.0)
        >>> audio = Modality("audio", input_channels=1, input_axis=1, num_freq_bands=8, max_freq=400.0)
        >>> model = MultimodalPerceiver([video, audio], depth=1, num_latents=8, latent_dim=16, num_classes=5)
        >>> model({"video": torch.randn(2, 4, 8, 8, 3), "audio": torch.randn(2, 500, 1)}).shape
        torch.Size([2, 5])
    """

    shard: Shard | None = None  # set by perceiver_fast.distributed.shard

    def __init__(
        self,
        modalities: Sequence[Modality],
        *,
        depth: int,
        modality_channels: int = 4,
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
        self_per_cross_attn: int = 1,
        final_classifier_head: bool = True,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.modalities = tuple(modalities)
        self.checkpoint = checkpoint
        check_modalities(type(self).__name__, self.modalities, modality_channels)
        self.input_dim = max(modality.own_channels for modality in self.modalities) + modality_channels
        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.embeddings = ModalityEmbeddings()
        for modality in self.modalities:
            embedding = torch.empty(self.input_dim - modality.own_channels)
            self.embeddings[modality.name] = nn.Parameter(nn.init.trunc_normal_(embedding, std=0.02, a=-0.04, b=0.04))

        self.layers, _ = build_blocks(
            depth,
            1 if weight_tie_layers else None,
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

    def check_inputs(
        self, data: Mapping[str, ModalityInput], mask: Mapping[str, Tensor | None] | None = None
    ) -> dict[str, Tensor | None]:
        """Check ``data`` and ``mask``, as the forward takes them.

        Returns:
            For every modality in ``data``, its mask or None.

        Raises:
            TypeError, ValueError: the message says expected, got and what to do.
        """
        return check_modality_inputs(type(self).__name__, self.modalities, data, mask, like(self))

    def tokens_of(
        self, data: Mapping[str, ModalityInput | Stream], mask: Mapping[str, Tensor | None] | None
    ) -> TokenGroups:
        """The checked and described tokens of ``data``, for what the forward takes."""
        streams = isinstance(data, Mapping) and any(isinstance(given, Stream) for given in data.values())
        if self.shard is not None or streams:
            return read_modalities(self, data, mask)
        given: Any = data
        return self.describe(given, self.check_inputs(given, mask))

    @op_range("describe")
    def describe(
        self, data: Mapping[str, ModalityInput], mask: Mapping[str, Tensor | None] | None = None
    ) -> TokenGroups:
        """The tokens of ``data``, one group for every modality that is there, in the constructor's order.

        Args:
            data: as the forward takes it.
            mask: ``[B, M]`` or None for each of them. Default: none.
        """
        present = [modality for modality in self.modalities if modality.name in data]
        groups = [
            describe_modality(modality, data[modality.name], self.embeddings(modality.name)) for modality in present
        ]
        return TokenGroups(groups, None if mask is None else [mask.get(modality.name) for modality in present])

    def forward(
        self,
        data: Mapping[str, ModalityInput | Stream],
        mask: Mapping[str, Tensor | None] | None = None,
        return_embeddings: bool = False,
    ) -> Tensor:
        """Classify, or embed.

        Args:
            data: by name, ``[B, n_1, .., n_A, input_channels]`` on a grid; or a pair of ``[B, M, input_channels]`` and
                its positions ``[B, M, A]`` or ``[M, A]``; or a :func:`perceiver_fast.stream`, which is read in chunks.
                Modalities may be left out, all but one.
            mask: by name, bool ``[B, M]`` or ``[B, n_1, .., n_A]``, True where a token may be attended to. A batch
                element whose tokens are masked in all modalities attends uniformly to all of them. Default: all True.
            return_embeddings: return the latents ``[B, N, D]`` in place of the logits. Default: False.

        Returns:
            Logits ``[B, num_classes]`` or latents ``[B, N, D]``.

        Raises:
            TypeError, ValueError: an unknown modality, no modality, or wrong dtype, rank, channels, size, batch, mask
                or device; the message says expected, got and what to do.
            perceiver_fast.backends.BackendError: a forced backend cannot run a layer.
        """
        tokens = self.tokens_of(data, mask)
        x = self.latents.unsqueeze(0).expand(tokens.batch, -1, -1)
        arguments = (keywords_for(block, PerceiverBlock, dict(context=tokens)) for block in self.layers)
        x = run_blocks(x, self.layers, repeat(None), None, arguments, self.checkpoint)
        return x if return_embeddings else self.to_logits(x)

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
