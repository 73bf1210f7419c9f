"""PerceiverLM of perceiver-pytorch: a language model of a PerceiverIO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers.checks import check_mask
from perceiver_fast.models.inputs import check_ids
from perceiver_fast.models.perceiver_io import PerceiverIO
from perceiver_fast.tokens import Tokens
from perceiver_fast.tracing import trainable


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

    def embed(self, x: Tensor) -> Tensor:
        """Token ids ``[B, n]`` to ``[B, n, dim]``, positions added."""
        return self.token_emb(x) + self.pos_emb(torch.arange(x.shape[1], device=x.device))

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
        mask = self.check_inputs(x, mask)
        x = self.embed(trainable(x))
        return self.perceiver_io(x, mask=mask, queries=x)

    if TYPE_CHECKING:  # torch leaves open what a call takes and returns
        __call__ = forward
