"""PerceiverLM of perceiver-pytorch: a language model of a PerceiverIO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers.checks import check_mask
from perceiver_fast.models.agreeing import agree
from perceiver_fast.models.inputs import check_ids
from perceiver_fast.models.perceiver_io import PerceiverIO
from perceiver_fast.shards.agreement import Look
from perceiver_fast.tokens import Tokens
from perceiver_fast.tracing import trainable

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard


class PerceiverLM(nn.Module):
    """A language model: embedded tokens are both the input and the queries of a :class:`PerceiverIO`.

    Args:
        dim: channels of the embeddings.
        num_tokens: size of the vocabulary.
        max_seq_len: longest sequence.
        **kwargs: the other arguments of :class:`PerceiverIO`; depth is required.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast import PerceiverLM
        >>> model = PerceiverLM(dim=12, num_tokens=50, max_seq_len=64, depth=1, num_latents=8, latent_dim=16)
        >>> model(torch.randint(0, 50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    shard: Shard | None = None  # set by perceiver_fast.distributed.shard

    def __init__(self, *, dim: int, num_tokens: int, max_seq_len: int, **kwargs: Any):
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(max_seq_len, dim)
        self.perceiver_io = PerceiverIO(dim=dim, queries_dim=dim, logits_dim=num_tokens, **kwargs)

    def check_inputs(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Check token ids and ``mask``; return the mask.

        Raises:
            TypeError, ValueError, IndexError: the message says expected, got and what to do.
        """
        who = type(self).__name__
        check_ids(who, x, self.token_emb.num_embeddings, self.pos_emb.num_embeddings, self.token_emb.weight)
        return check_mask(who, mask, "x", x, x.shape[1:])

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """Token ids ``[B, n]`` to ``[B, n, dim]``, with the positions from ``start`` on added."""
        return self.token_emb(x) + self.pos_emb(torch.arange(start, start + x.shape[1], device=x.device))

    def describe(self, x: Tensor) -> Tokens:
        """The tokens that the latents attend to, of token ids ``[B, n]``."""
        return self.perceiver_io.describe(self.embed(x))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            x: token ids ``[B, n]``, int64 or int32, n at most max_seq_len.
            mask: bool ``[B, n]``, True where a token may be attended to. Default: all True.

        Returns:
            ``[B, n, num_tokens]``.

        Raises:
            TypeError, ValueError, IndexError: wrong dtype, rank, length, id, mask or device; the message says expected,
                got and what to do.
        """
        if self.shard is not None:
            return self._forward_shard(self.shard, x, mask)
        mask = self.check_inputs(x, mask)
        x = self.embed(trainable(x))
        return self.perceiver_io(x, mask=mask, queries=x)

    def _forward_shard(self, shard: Shard, x: Tensor, mask: Tensor | None) -> Tensor:
        """:meth:`forward` of this process' part of every sequence: logits of its positions."""
        who, longest = type(self).__name__, self.pos_emb.num_embeddings

        def look() -> Look:
            own, own_mask = shard.own(who, "x", x), shard.own(who, "mask", mask)
            if isinstance(own, Tensor) and own.dim() == 2 and own.shape[1] == 0:
                own_mask = self.check_inputs(own.new_zeros(own.shape[0], 1), None)
            else:
                own_mask = self.check_inputs(own, own_mask)
            return Look([own.shape[1]], dict(batch=own.shape[0]), (own, own_mask))

        (own, own_mask), (place,) = agree(self, look)
        if place.total > longest:
            raise ValueError(
                f"{who}: expected at most {longest} tokens (max_seq_len={longest}) of all processes, got {place.total}; cut "
                f"the sequence, or build the model with max_seq_len={place.total}"
            )
        with shard.local_parameters(self.token_emb, self.pos_emb):
            embedded = self.embed(trainable(own), place.start)
        return self.perceiver_io(embedded, mask=own_mask, queries=embedded)

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
