"""PerceiverIO of perceiver-pytorch: any array in, one output a query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from perceiver_fast.layers import PerceiverBlock, PreNorm
from perceiver_fast.layers.checks import check_data, check_mask
from perceiver_fast.layers.described import check_described, check_described_mask, described_tokens
from perceiver_fast.layers.fusing import is_plain, is_watched
from perceiver_fast.layers.pre_norm import add_layer, keywords_for, why_modules
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.sequence_dropout import drop_tokens
from perceiver_fast.layers.without_dropout import Attention, FeedForward
from perceiver_fast.models.checkpoints import upgrade_io_state_dict
from perceiver_fast.models.described import check_out, decode_described
from perceiver_fast.models.inputs import check_queries, check_width, context_channels, like, norm_channels
from perceiver_fast.models.parts import kept_tokens, read_parts
from perceiver_fast.models.stack import build_blocks, first_hiddens, rows_for, run_blocks, run_checkpointed
from perceiver_fast.tokens import DenseTokens, Description, GridDescription, Stream, Tokens, TokenStream
from perceiver_fast.tracing import own, trainable

if TYPE_CHECKING:
    import numpy as np

    from perceiver_fast.shards.agreement import Place
    from perceiver_fast.shards.shard import Shard

DECODER_ROWS = 8192  # queries decoded at once in inference: enough for full speed, few enough to fit into CPU caches


class PerceiverIO(nn.Module):
    """Latents that attend to the input once, then to each other; queries that attend to the latents.

    The arguments, the state_dict, the outputs and the gradients are perceiver-pytorch 0.11.0's; the same seed gives
    the same initial weights and drops the same tokens. Checkpoints of perceiver-pytorch 0.8 are renamed as they load.
    In inference, queries are decoded in parts, so that memory beside the output does not grow with their number.

    Args:
        depth: number of self-attention blocks.
        dim: channels of the input.
        queries_dim: channels of the queries.
        logits_dim: channels of the output. Default: None, queries_dim without a last projection.
        num_latents, latent_dim, cross_heads, latent_heads, cross_dim_head, latent_dim_head, attn_residual,
            attn_residual_rank, checkpoint: as those of :class:`perceiver_fast.Perceiver`, with the same defaults.
        weight_tie_layers: share the weights of all blocks. Default: False.
        decoder_ff: a feed-forward after the decoder's cross-attention. Default: False.
        seq_dropout_prob: share of the input's tokens left out, in training. Default: 0.
        inverted_cross_attn: softmax over the latents, then normalised over the tokens. Default: False.

    Source:
        Jaegle et al., "Perceiver IO: A general architecture for structured inputs & outputs", ICLR 2022;
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast import PerceiverIO
        >>> model = PerceiverIO(depth=1, dim=9, queries_dim=6, logits_dim=5, num_latents=8, latent_dim=16)
        >>> model(torch.randn(2, 30, 9), queries=torch.randn(100, 6)).shape
        torch.Size([2, 100, 5])
    """

    checkpoint = False
    shard: Shard | None = None  # set by perceiver_fast.distributed.shard

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        queries_dim: int,
        logits_dim: int | None = None,
        num_latents: int = 512,
        latent_dim: int = 512,
        cross_heads: int = 1,
        latent_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        weight_tie_layers: bool = False,
        decoder_ff: bool = False,
        seq_dropout_prob: float = 0.0,
        attn_residual: bool = False,
        attn_residual_rank: int = 64,
        inverted_cross_attn: bool = False,
        checkpoint: bool = False,
    ):
        super().__init__()
        self.input_axis = 1
        self.input_channels = self.input_dim = dim
        self.queries_dim = queries_dim
        self.seq_dropout_prob = seq_dropout_prob
        self.has_attn_residual = attn_residual
        self.inverted_cross_attn = inverted_cross_attn
        self.checkpoint = checkpoint
        heads: dict[str, Any] = dict(
            cross_heads=cross_heads,
            latent_heads=latent_heads,
            cross_dim_head=cross_dim_head,
            latent_dim_head=latent_dim_head,
        )

        self.latents = nn.Parameter(torch.randn(num_latents, latent_dim))
        self.cross_attend_block = PerceiverBlock(dim=latent_dim, context_dim=dim, self_per_cross_attn=0, **heads)

        shared = 0 if weight_tie_layers else None
        rank = attn_residual_rank if attn_residual else None
        self.layers, self.attn_residuals = build_blocks(
            depth, shared, rank, dim=latent_dim, has_cross_attn=False, **heads
        )
        decoder = Attention(queries_dim, latent_dim, heads=cross_heads, dim_head=cross_dim_head)
        self.decoder_cross_attn = PreNorm(queries_dim, decoder, context_dim=latent_dim)
        self.decoder_ff = PreNorm(queries_dim, FeedForward(queries_dim)) if decoder_ff else None
        self.to_logits = nn.Identity() if logits_dim is None else nn.Linear(queries_dim, logits_dim)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "input_dim" not in self.__dict__:  # pickled by perceiver-pytorch
            self.input_axis = 1
            channels: Any = context_channels(self)  # its norms say
            self.input_channels = self.input_dim = channels
            self.queries_dim = self.decoder_cross_attn.norm.normalized_shape[0]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        upgrade_io_state_dict(self, state_dict, prefix)  # before the submodules look up their keys
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_inputs(self, data: Tensor | Description, mask: Tensor | None) -> Tensor | None:
        """Check ``data`` and ``mask``, as the forward takes them.

        Returns:
            The mask; a copy where gradients are recorded, since the backward needs it and the caller may change it.

        Raises:
            TypeError, ValueError: the message says expected, got and what to do.
        """
        who = type(self).__name__
        channels = self.input_channels
        if isinstance(data, Description):
            channels = check_width(channels, data.channels, context_channels(self))
            check_described(who, "data", data, like(self), batch=None, channels=channels, argument="dim")
            mask = check_described_mask(who, "data", mask, data, like(self))
            return None if mask is None else own(mask)
        if isinstance(data, Tensor) and data.dim() > 0 and data.shape[-1] != channels:
            channels = check_width(channels, data.shape[-1], context_channels(self))
        check_data(who, "data", data, like(self), axes=1, channels=channels, channels_argument="dim")
        mask = check_mask(who, mask, "data", data, data.shape[1:-1])
        return None if mask is None else own(mask)

    def _query_channels(self, queries: Tensor | Description) -> int:
        """The number of channels to expect of ``queries``."""
        if isinstance(queries, Description):
            given = queries.channels
        elif isinstance(queries, Tensor) and queries.dim() > 0:
            given = queries.shape[-1]
        else:
            return self.queries_dim
        norm = getattr(self.decoder_cross_attn, "norm", None)
        return check_width(self.queries_dim, given, norm_channels(norm))

    def _check_described_queries(self, who: str, queries: Description, batch: int) -> None:
        """Raise unless described queries are for a batch, and of the channels that the decoder takes."""
        channels = self._query_channels(queries)
        check_described(who, "queries", queries, like(self), batch=batch, channels=channels, argument="queries_dim")

    def tokens_of(
        self,
        data: Tensor | Description | Stream,
        mask: Tensor | None,
        also: Callable[[int], dict[str, object]] = lambda batch: {},
    ) -> tuple[Tokens | TokenStream, Tensor | None]:
        """The checked and described tokens of ``data``, and their mask, for what the forward takes; ``also``: see read_parts."""
        drops = self.training and self.seq_dropout_prob > 0.0
        if self.shard is not None or isinstance(data, Stream):
            tokens, mask = read_parts(self, data, mask, also=also)
            return tokens, self._drop_of_parts(tokens, mask) if drops else mask
        mask = self.check_inputs(data, mask)
        also(data.batch if isinstance(data, Description) else data.shape[0])
        if drops:
            if isinstance(data, Description):
                data = data.tensor(like(self))
            data, mask = drop_tokens(data, mask, self.seq_dropout_prob)
        return self.describe(data), mask

    def _drop_of_parts(self, tokens: Tokens | TokenStream, mask: Tensor | None) -> Tensor:
        """The mask that leaves out the tokens that one process would drop of all of them."""
        if mask is not None or isinstance(tokens, TokenStream):
            raise ValueError(
                f"{type(self).__name__}: expected seq_dropout_prob=0 in training on streamed tokens, or on sharded ones with a "
                f"mask, got {self.seq_dropout_prob}; set it to 0, or leave the masked tokens out"
            )
        return kept_tokens(tokens.batch, tokens.first, tokens.count, tokens.total, self.seq_dropout_prob, tokens.device)

    def describe(self, data: Tensor | Description, coords: None = None, place: Place | None = None) -> Tokens:
        """The tokens of ``data``.

        Args:
            data: ``[B, M, dim]`` or a description.
            coords: none; a description has them.
            place: of these tokens among all, where they are a part of an input. Default: they are all.
        """
        if not isinstance(data, Description):
            tokens: Tokens = DenseTokens(trainable(data))
        elif self.shard is None:
            tokens = described_tokens(data, like(self))
        else:
            if isinstance(data, GridDescription) and place is not None:
                data = data.placed(*place)
            with self.shard.local_parameters(data.embed):
                tokens = described_tokens(data, like(self))
        return tokens

    @overload
    def forward(
        self,
        data: Tensor | Description | Stream,
        mask: Tensor | None = None,
        queries: Tensor | Description | None = None,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        data: Tensor | Description | Stream,
        mask: Tensor | None = None,
        queries: Tensor | Description | None = None,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        *,
        return_hiddens: Literal[True],
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward(
        self,
        data: Tensor | Description | Stream,
        mask: Tensor | None = None,
        queries: Tensor | Description | None = None,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        data: Tensor | Description | Stream,
        mask: Tensor | None = None,
        queries: Tensor | Description | None = None,
        block_outputs: Sequence[Tensor] | Tensor | None = None,
        return_hiddens: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor] | None]:
        """Decode, or embed.

        Args:
            data: ``[B, M, dim]``, the dtype and device of the parameters; or a description of them,
                :func:`perceiver_fast.grid_tokens` or :func:`perceiver_fast.point_tokens`, which gives the numbers of the
                tensor that it stands for, at the cost of the tokens' positions. (In training with seq_dropout_prob it
                is built.) Or a :func:`perceiver_fast.stream`, which is read in chunks.
            mask: bool ``[B, M]``, True where a token may be attended to. A row that is all False attends uniformly to
                all tokens, as in perceiver-pytorch. Default: all True.
            queries: ``[B, Q, queries_dim]``, or ``[Q, queries_dim]`` when the whole batch shares them; or a description of
                them, as of ``data``. Default: None, return the latents.
            block_outputs: outputs of earlier blocks, for the attention residual. Default: the latents after the
                cross-attention.
            return_hiddens: also return the outputs of all blocks. Default: False.

        Returns:
            ``[B, Q, logits_dim]``, or latents ``[B, N, latent_dim]``; with return_hiddens, a tuple of that and the list
            of block outputs, each ``[B, N, latent_dim]``.

        Raises:
            TypeError, ValueError: wrong dtype, rank, channels, size, mask or device; the message says expected, got
                and what to do.
            perceiver_fast.backends.BackendError: a forced backend cannot run a layer.
        """
        shared = self.shard is None or not self.shard.queries

        def check(batch: int) -> dict[str, object]:
            self._check_queries(queries, batch)
            asked: dict[str, object] = {"queries": queries is not None, "block_outputs": block_outputs is not None}
            if queries is not None and shared:
                asked["size of queries"] = queries.count if isinstance(queries, Description) else queries.shape[-2]
            return asked

        tokens, mask = self.tokens_of(data, mask, check)
        batch = tokens.batch
        if isinstance(queries, Tensor) and queries.dim() == 2:
            queries = queries.unsqueeze(0)
        x = self.latents.unsqueeze(0).expand(batch, -1, -1)
        keywords: dict[str, Any] = dict(context=tokens, mask=mask, inverted_attention=self.inverted_cross_attn)
        keywords = keywords_for(self.cross_attend_block, PerceiverBlock, keywords)
        x = rows_for(self.cross_attend_block, x)
        x = run_checkpointed(self.cross_attend_block, self.checkpoint, x, **keywords)
        hiddens = first_hiddens(x, block_outputs, return_hiddens or self.has_attn_residual)
        x = run_blocks(x, self.layers, self.attn_residuals, hiddens, repeat({}), self.checkpoint)
        out = x if queries is None else self._decode_any(queries, x)
        return (out, hiddens) if return_hiddens else out

    def _check_queries(self, queries: Tensor | Description | None, batch: int) -> None:
        """Raise unless ``queries`` are for a batch, and of the channels that the decoder takes."""
        if isinstance(queries, Description):
            self._check_described_queries(type(self).__name__, queries, batch)
        elif queries is not None:
            check_queries(type(self).__name__, queries, batch, self._query_channels(queries), like(self))

    def _decode_any(self, queries: Tensor | Description, latents: Tensor) -> Tensor:
        """The output for queries ``[B or 1, Q, queries_dim]``, or described ones."""
        parameters: AbstractContextManager[None] = nullcontext()
        if self.shard is not None and self.shard.queries:  # what decodes own queries alone gets a part of its gradient
            (latents,) = self.shard.local(latents)
            parameters = self.shard.local_parameters(self.decoder_cross_attn, self.decoder_ff, self.to_logits)
        with parameters:
            if isinstance(queries, Description):
                return self._decode_described(queries, latents)
            return self._decode(trainable(queries).expand(latents.shape[0], -1, -1), DenseTokens(latents))

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward

    @torch.no_grad()
    def decode_into(
        self,
        out: Tensor | np.ndarray,
        data: Tensor | Description | Stream,
        queries: Description,
        mask: Tensor | None = None,
        progress: bool = False,
    ) -> None:
        """:meth:`forward` in inference for described queries, part by part into memory that exists, such as a file's.

        Memory beside ``out`` stays bounded, whatever the number of queries.

        Args:
            out: a tensor ``[B, Q, O]`` or ``[B, *sizes, O]``, O = logits_dim, contiguous; or such a writable numpy array,
                for instance a ``numpy.memmap`` on a disk. It is written to.
            data, mask: see :meth:`forward`.
            queries: a description, :func:`perceiver_fast.grid_queries` or :func:`perceiver_fast.point_queries`.
            progress: show a bar. Default: False.

        Raises:
            TypeError, ValueError: as :meth:`forward`, and for an ``out`` of another size; the message says expected, got
                and what to do.

        Example:
            >>> import numpy, torch, perceiver_fast as pf
            >>> queries = pf.grid_queries((8, 8, 8), num_freq_bands=2, max_freq=8.0)
            >>> model = pf.PerceiverIO(depth=1, dim=9, queries_dim=15, logits_dim=1, num_latents=8, latent_dim=16)
            >>> field = numpy.zeros((1, 8, 8, 8, 1), dtype="float32")
            >>> model.decode_into(field, torch.randn(1, 30, 9), queries)
            >>> bool((field != 0).all())
            True
        """
        who = f"{type(self).__name__}.decode_into"
        if not isinstance(queries, Description):
            raise TypeError(f"{who}: expected described queries, got {type(queries).__name__}; see grid_queries")
        if self.shard is None and not isinstance(data, Stream):  # before the work
            self.check_inputs(data, mask)
            batch = data.batch if isinstance(data, Description) else data.shape[0]
            self._check_described_queries(who, queries, batch)
            check_out(who, out, batch, queries)
        latents = self(data, mask=mask)
        self._check_described_queries(who, queries, latents.shape[0])
        self._decode_described(queries, latents, check_out(who, out, latents.shape[0], queries), progress)

    def _decode_described(
        self, queries: Description, latents: Tensor, out: Tensor | None = None, progress: bool = False
    ) -> Tensor:
        """The output ``[B, Q, logits_dim]`` for described queries, written to ``out`` if that is given."""
        tokens = DenseTokens(latents)
        return decode_described(
            queries,
            latents,
            self.decoder_cross_attn,
            self.to_logits if self.decoder_ff is None else None,
            self._after_attention,
            lambda built: self._decode(built, tokens),
            DECODER_ROWS if self._has_plain_decoder() else None,
            out,
            progress,
        )

    def _decode(self, queries: Tensor, latents: Tokens) -> Tensor:
        """The output ``[B, Q, logits_dim]`` for queries ``[B, Q, queries_dim]``; in inference part by part."""
        # Parts save no memory in training, where all intermediates are saved, and a traced graph would repeat the decoder.
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if whole or not self._decodes_in_parts(queries):
            return self._decode_part(queries, latents)
        out: Any = None
        for start in range(0, queries.shape[1], DECODER_ROWS):
            part = self._decode_part(queries[:, start : start + DECODER_ROWS], latents)
            if out is None:
                out = part.new_empty(part.shape[0], queries.shape[1], part.shape[2])
            out[:, start : start + DECODER_ROWS] = part
        return out

    def _decodes_in_parts(self, queries: Tensor) -> bool:
        """Whether there are many queries, and every layer is plain: another one may mix queries, and then needs all."""
        return queries.shape[1] > DECODER_ROWS and self._has_plain_decoder()

    def _has_plain_decoder(self) -> bool:
        """Whether every layer of the decoder is plain: then no query's output hangs on another's."""
        layers: list[Any] = (
            [self.decoder_cross_attn] if self.decoder_ff is None else [self.decoder_cross_attn, self.decoder_ff]
        )
        if any(why_modules(layer) is not None or not is_plain(layer.norm, nn.LayerNorm) for layer in layers):
            return False
        fn: Any = self.decoder_cross_attn.fn
        if not (is_plain(fn.to_q, nn.Linear) and is_plain(fn.to_out, nn.Linear)):
            return False
        return is_plain(self.to_logits, nn.Linear, nn.Identity)

    def _decode_part(self, queries: Tensor, latents: Tokens) -> Tensor:
        """The output for some of the queries, ``[B, q, queries_dim]`` to ``[B, q, logits_dim]``."""
        return self._after_attention(
            self.decoder_cross_attn(queries, **keywords_for(self.decoder_cross_attn, PreNorm, dict(context=latents)))
        )

    def _after_attention(self, x: Tensor) -> Tensor:
        """What follows the decoder's attention, ``[B, q, queries_dim]`` to ``[B, q, logits_dim]``."""
        if self.decoder_ff is not None:
            stream = ResidualStream(x)
            add_layer(stream, self.decoder_ff, is_watched(x))
            x = stream.value()
        return self.to_logits(x)
