"""Cross-attention of the latents to tokens, with PreNorm of both sides: where the package's kernels are used.

On a grid, LayerNorm and the projection of the tokens are absorbed into the layer's weight, and the weight into the
N queries and N results:

    W       = (to_kv * gamma) minus its row means      LayerNorm's centring is linear: z W^T = (z - mean) (W')^T
    [K | V] = W [I_F | E_1^T | .. | E_A^T]             keys and values of the basis [x, onehot, .., onehot]
    q       = to_q(norm(x)) K / sqrt(d)                [N, L], what ops.grid_attention takes
    out     = to_out(o V^T + W_v beta)                 beta's share is the same for every token
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice, forced_backend, require
from perceiver_fast.layers.attention import Attention
from perceiver_fast.ops.cross_attention import CrossAttentionCall, choose_cross_attention, cross_attention
from perceiver_fast.ops.grid_attention import GridAttentionCall, choose_grid_attention, grid_attention_joined
from perceiver_fast.ops.library import autocast_dtype
from perceiver_fast.tokens import GridTokens, Tokens

ONE_AXIS_LIMIT = 1024  # tokens; below it either path takes no time, and the kernel is the more exact one


class CrossAttention(nn.Module):
    """Attention of ``x [B, N, D]`` to tokens; parameters as in perceiver-pytorch's PreNorm(Attention).

    Args:
        dim: channels of the latents, D.
        context_dim: channels of the tokens as perceiver-pytorch builds them, C.
        heads, dim_head, dropout: see :class:`Attention`.
    """

    def __init__(self, dim: int, context_dim: int, heads: int, dim_head: int, dropout: float):
        super().__init__()
        self.fn = Attention(dim, context_dim, heads=heads, dim_head=dim_head, dropout=dropout)
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim)

    def plan(self, tokens: Tokens, inverted: bool = False) -> Choice:
        """The op and backend that a forward on ``tokens`` takes in the current mode, and why not the others.

        Raises:
            perceiver_fast.backends.BackendError: a forced backend cannot run it.
        """
        dropout = self.fn.active_dropout
        if isinstance(tokens, GridTokens):
            grid = self._plan_grid(tokens, dropout, inverted)
        else:
            grid = Choice("grid_attention", None, {"any": ["the tokens come with their own encoding, not as a grid"]})
        built = choose_cross_attention(CrossAttentionCall(dropout, inverted))
        choice = require(grid, built)
        if choice is grid:
            return grid
        passed_over = {f"grid_attention[{name}]": why for name, why in grid.rejected.items()}
        return Choice(built.op, built.backend, passed_over | built.rejected)

    @staticmethod
    def _plan_grid(tokens: GridTokens, dropout: float, inverted: bool) -> Choice:
        sizes = tokens.sizes
        choice = choose_grid_attention(
            GridAttentionCall(tokens.feat.dtype, tokens.feat.device, sizes, dropout, inverted)
        )
        if forced_backend() != "auto" or choice.backend is None:
            return choice
        count = math.prod(sizes)
        if choice.backend == "reference":
            why = "it forms the N x M logits, which attention on built keys and values need not"
        elif max(sizes) == count >= ONE_AXIS_LIMIT:
            # Every latent would need a table entry for every token, twice: keys and values are smaller and faster.
            why = f"one axis of {count}: its table would be as large as the logits"
        else:
            return choice
        return Choice(choice.op, None, choice.rejected | {choice.backend: [why]})

    def forward(self, x: Tensor, tokens: Tokens, mask: Tensor | None = None, inverted: bool = False) -> Tensor:
        """Attend.

        Args:
            x: latents ``[B, N, D]``, or ``[1, N, D]`` when the whole batch shares them.
            tokens: what is attended to.
            mask: bool ``[B, M]``, True where a token may be attended to.
            inverted: softmax over the latents, then normalised over the tokens.

        Returns:
            ``[B, N, D]``.
        """
        x = self.norm(x)
        if self.plan(tokens, inverted).op == "grid_attention":
            return self._attend_to_grid(x, tokens, mask)
        return self._attend_to_built(x, tokens, mask, inverted)

    def grid_tables(self, x: Tensor, tokens: GridTokens) -> tuple[Tensor, Tensor, Tensor]:
        """What the grid op needs of normalised latents ``x``, in the dtype it computes in.

        Returns:
            q ``[B, H N, L]`` (or ``[1, H N, L]``), the values of the basis ``[H, L, d]`` and beta's share ``[H, d]``.
        """
        fn = self.fn
        q = fn.to_q(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = tokens.project(fn.to_kv, self.norm_context)
            keys, values = weight.unflatten(0, (2, fn.heads, fn.dim_head))  # [H, d, L]
            q = q.to(weight.dtype).unflatten(-1, (fn.heads, fn.dim_head)) * fn.dim_head**-0.5  # [B, N, H, d]
            q = torch.einsum("bnhd,hdl->bhnl", q, keys).flatten(1, 2)
            beta = bias.unflatten(0, (2, fn.heads, fn.dim_head))[1]
        return q, values.transpose(1, 2), beta

    def _attend_to_grid(self, x: Tensor, tokens: GridTokens, mask: Tensor | None) -> Tensor:
        feat = tokens.feat
        q, values, beta = self.grid_tables(x, tokens)
        with torch.autocast(x.device.type, enabled=False):
            q = q.expand(feat.shape[0], -1, -1)
            mask = None if mask is None else mask.view(feat.shape[:-1])
            scale = tokens.scale(self.norm_context.eps)
            o, _ = grid_attention_joined(q, feat, scale, mask)
            out = torch.einsum("bhnl,hld->bnhd", o.unflatten(1, (self.fn.heads, -1)), values) + beta
        return self.fn.to_out(out.flatten(2).to(autocast_dtype(x.device) or x.dtype))

    def _attend_to_built(self, x: Tensor, tokens: Tokens, mask: Tensor | None, inverted: bool) -> Tensor:
        fn = self.fn
        kv = tokens.keys_values(fn.to_kv, self.norm_context)
        q = fn.split_heads(fn.to_q(x).expand(kv.shape[0], -1, -1))
        k, v = (fn.split_heads(t) for t in kv.chunk(2, dim=-1))
        out = cross_attention(q, k, v, mask, fn.active_dropout, inverted)
        return fn.to_out(out.transpose(1, 2).flatten(2))
