"""Attention to keys and values that are projected where they are used: some tokens at a time, forward and backward.

The keys and values of all tokens, their gradients, and the copy that joins these are each larger than caches, and the
system has to clear every page of fresh memory. A piece of the tokens is projected, attended to and forgotten, so what is
between the two kernels stays in cache. With ``w_k = exp(lse_k - lse)`` the pieces of one batch element are

    o = sum_k w_k o_k        d o_k = w_k d_o        d lse_k = w_k (d_o . (o_k - o) + d_lse)

The backward projects again, so tokens of many channels are projected all at once instead: that costs less, and positions
that the batch shares are encoded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perceiver_fast.ops import blocks
from perceiver_fast.ops.derivatives import differentiable, differentiated_again, transformed
from perceiver_fast.ops.fourier_projection import FOURIER_PROJECTION, centred, fourier_projection_unchecked
from perceiver_fast.ops.library import compute_dtype, learns, unless_autocast
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ranges import op_range
from perceiver_fast.tracing import intercepted, own

OP = "projected_attention"
PIECE = 2**19  # numbers of keys and values of a piece, for every thread: about what the second-level caches hold
LEAST_PIECES = 4  # fewer gain nothing
MOST_CHANNELS = 96  # of tokens


class Projection(NamedTuple):
    """What keys and values are made of: arguments of :func:`fourier_projection_unchecked`.

    Attributes:
        feat: ``[B, M, F]``.
        coords: float64 ``[Bc, M, A]``, Bc = 1 or B.
        frequencies: float64 ``[A, K]``.
        weight: ``[C, 2 H d]``.
        bias: ``[2 H d]``.
        eps: LayerNorm's epsilon.
        dtype: of keys and values that are built. Pieces are not rounded to it.
    """

    feat: Tensor
    coords: Tensor
    frequencies: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype

    def keys_values(self) -> Tensor:
        """All keys and values, ``[B, M, 2 H d]``."""
        return fourier_projection_unchecked(*self[:-1]).to(self.dtype)


class Piece(NamedTuple):
    """Some batch elements and some of their tokens."""

    elements: slice
    tokens: slice

    def of(self, t: Tensor) -> Tensor:
        """A piece of ``[B, M, ..]``, or of ``[1, M, ..]`` that the whole batch shares."""
        return t[:, self.tokens] if t.shape[0] == 1 else t[self.elements, self.tokens]


def pieces(batch: int, tokens: int, rows: int) -> Iterator[Piece]:
    """All tokens, in order: whole batch elements, or parts of one.

    Args:
        batch, tokens: B and M.
        rows: tokens of a piece at most.
    """
    for element in range(0, batch, step := max(1, rows // tokens)):
        for first in range(0, tokens, rows):
            yield Piece(slice(element, min(batch, element + step)), slice(first, min(tokens, first + rows)))


def rows_of_pieces(latents: int, inner: int, learning: bool, projection: Projection, mask: Tensor | None) -> int:
    """How many tokens attention on CPU kernels takes at a time; 0 where it takes all of them at once.

    It takes pieces of many tokens of few channels, unless somebody looks at operators, or keys and values are constants. A
    masked element of the batch is one piece, since a mask that leaves no token means something else.

    Args:
        latents, inner: N and H d of the queries.
        learning: whether these need gradients.
        projection: of keys and values.
        mask: bool ``[B, M]`` or None.
    """
    if torch.compiler.is_compiling() or transformed() or intercepted():
        return 0
    (batch, tokens), (channels, width) = projection.feat.shape[:2], projection.weight.shape
    fit = width == 2 * inner  # if not, whoever builds keys and values says so
    if not fit or tokens < 2 or channels > MOST_CHANNELS:
        return 0
    # Results of parts are saved: keys and values of a part are four times as many numbers at least.
    rows = max(1, PIECE * torch.get_num_threads() // width, 2 * latents)
    if batch * tokens < LEAST_PIECES * rows or (mask is not None and tokens > rows):
        return 0
    if learning and not learns(*projection[:5]):
        return 0
    call = PointwiseCall(projection.weight.dtype, projection.feat.device)
    return rows if FOURIER_PROJECTION.choose(call).backend == "cpu" else 0


def _project(piece: Piece, feat, coords, frequencies, weight, bias, eps) -> tuple[Tensor, Tensor]:
    """Keys and values of a piece, and LayerNorm's scale."""
    return torch.ops.perceiver_fast.fourier_projection_forward(
        piece.of(feat), piece.of(coords), frequencies, weight, bias, eps
    )


def _halves(kv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """``[B, M, 2 H d]`` to keys and values ``[B, H, M, d]``."""
    k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in kv.chunk(2, -1))
    return k, v


def _joined(d_k: Tensor, d_v: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return torch.cat([t.transpose(1, 2).flatten(2) for t in (d_k, d_v)], -1)


def _merged(found: tuple[Tensor, Tensor] | None, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to tokens of two parts, in float64."""
    if found is None:
        return o.double(), lse
    total = torch.logaddexp(found[1], lse)
    before, now = ((part - total).exp().unsqueeze(-1) for part in (found[1], lse))
    return before * found[0] + now * o, total


class ProjectedAttentionFunction(torch.autograd.Function):
    """Forward and backward of all pieces; saves the inputs, o and lse, and o and lse of pieces that are parts."""

    @staticmethod
    def forward(ctx, q, feat, coords, frequencies, weight, bias, mask, eps, scale, rows):
        (batch, tokens), heads = feat.shape[:2], q.shape[1]
        o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float64)
        kept: list[Tensor] = []
        found: Any = None  # of the parts so far
        for piece in pieces(batch, tokens, rows):
            at, whole = piece.elements, piece.tokens.stop - piece.tokens.start == tokens
            kv, _ = _project(piece, feat, coords, frequencies, weight, bias, eps)
            part_mask = None if mask is None else mask[at]
            part_o, part_lse, _ = torch.ops.perceiver_fast.cross_attention_forward(
                q[at], *_halves(kv, heads), part_mask, scale, 0.0, None, False
            )
            if whole:
                o[at], lse[at] = part_o, part_lse
                continue
            kept += [part_o, part_lse]
            found = _merged(found, part_o, part_lse)
            if piece.tokens.stop == tokens:
                (o[at], lse[at]), found = found, None
        ctx.save_for_backward(q, feat, coords, frequencies, weight, bias, mask, o, lse, *kept)
        ctx.options = eps, scale, rows  # the backward takes the same pieces, whatever the number of threads is then
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @op_range(OP + ".backward")
    def backward(ctx, d_o, d_lse):
        q, feat, coords, frequencies, weight, bias, mask, *rest = ctx.saved_tensors
        eps, scale, rows = ctx.options
        to_q, to_feat, to_coords, _, to_weight, to_bias = ctx.needs_input_grad[:6]

        def kernel():
            d_out = torch.zeros_like(q) if d_o is None else d_o
            arguments = q, feat, coords, frequencies, weight, bias, mask, eps, scale, rows
            return _gradients(d_out, d_lse, arguments, rest, to_feat or to_coords)

        needed = to_q, to_feat, to_coords, to_weight, to_bias
        if differentiated_again():

            def form(q, feat, coords, weight, bias):
                kv = blocks.fourier_projection(feat, coords, frequencies, weight, bias, eps)
                return blocks.cross_attention(q, *_halves(kv, q.shape[1]), mask, scale, 0.0, None, False)

            grads: Any = differentiable(kernel, form, (q, feat, coords, weight, bias), (d_o, d_lse), needed)
        else:
            grads = (grad if need else None for grad, need in zip(kernel(), needed))
        d_q, d_feat, d_coords, d_weight, d_bias = grads
        return d_q, d_feat, d_coords, None, d_weight, d_bias, None, None, None, None


def _gradients(d_o, d_lse, arguments, rest, to_tokens: bool) -> tuple[Tensor | None, ...]:
    """By q, feat, coords, weight and bias; those by tokens only where ``to_tokens``."""
    q, feat, coords, frequencies, weight, bias, mask, eps, scale, rows = arguments
    o, lse, *kept = rest
    (batch, tokens), heads, saved = feat.shape[:2], q.shape[1], iter(kept)
    no_statistics = lse.new_empty(0)
    d_q, d_weight, d_bias = (torch.zeros_like(t, dtype=torch.float64) for t in (q, weight, bias))
    d_feat: Any = None
    d_coords: Any = None
    if to_tokens:
        d_feat, d_coords = torch.zeros_like(feat), torch.zeros_like(coords)
    for piece in pieces(batch, tokens, rows):
        at = piece.elements
        kv, norm_scale = _project(piece, feat, coords, frequencies, weight, bias, eps)
        part_o, part_lse, part_d_o = o[at], lse[at], d_o[at]
        part_d_lse = None if d_lse is None else d_lse[at]
        if piece.tokens.stop - piece.tokens.start < tokens:
            # A part's own results, since over its tokens dS has to sum to d_lse: the kernel finds its rounding errors by that.
            part_o, part_lse = next(saved), next(saved)
            share = (part_lse - lse[at]).exp()
            moved = (d_o[at].double() * (part_o.double() - o[at])).sum(-1)
            part_d_o = (share.unsqueeze(-1) * d_o[at]).to(q.dtype)
            part_d_lse = share * (moved if d_lse is None else moved + d_lse[at])
        part_mask = None if mask is None else mask[at]
        part_d_q, *d_kv = torch.ops.perceiver_fast.cross_attention_backward(
            part_d_o, part_d_lse, q[at], *_halves(kv, heads), part_mask, scale, 0.0, None, False, part_o, part_lse,
            no_statistics, True,
        )  # fmt: skip
        d_q[at] += part_d_q
        joined = _joined(*d_kv)
        part_d_weight, part_d_feat, part_d_coords = torch.ops.perceiver_fast.fourier_projection_backward(
            joined, piece.of(feat), piece.of(coords), frequencies, weight, norm_scale, eps, to_tokens
        )
        d_weight += part_d_weight
        d_bias += joined.sum((0, 1))
        if to_tokens:
            piece.of(d_feat).add_(part_d_feat)
            piece.of(d_coords).add_(part_d_coords)
    return d_q.to(q.dtype), d_feat, d_coords, d_weight.to(weight.dtype), d_bias.to(bias.dtype)


@op_range(OP)
def projected_attention(
    q: Tensor, projection: Projection, rows: int, mask: Tensor | None, scale: float, with_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale q k^T) v`` of keys and values that are projected, on CPU kernels; inputs are not checked.

    Args:
        q: ``[B, H, N, d]``.
        projection: of keys and values.
        rows: tokens of a piece, as :func:`rows_of_pieces` has them.
        mask: bool ``[B, M]``, True where a token may be attended to; a row that is all False attends uniformly. Or None.
        scale: of the logits.
        with_lse: whether the log-sum-exp is needed. Default: False.

    Returns:
        ``[B, H, N, d]``, the dtype of q, and the log-sum-exp ``[B, H, N]`` in float64, or None. Differentiable any number
        of times.
    """
    compute = compute_dtype(q.dtype)
    with unless_autocast(q.device):
        weight = centred(projection.weight.to(compute), 0)
        if mask is not None:
            mask = own(mask) if learns(q, *projection[:5]) else mask  # its owner may refill it before the backward
            if not with_lse:  # who sees a single token has a weight of one there, whatever the query
                q = q * (mask.sum(-1) > 1)[:, None, None, None]
        o, lse = ProjectedAttentionFunction.apply(
            q.to(compute), projection.feat.to(compute), projection.coords, projection.frequencies, weight,
            projection.bias.to(compute), mask, projection.eps, scale, rows,
        )  # fmt: skip
    return o.to(q.dtype), lse if with_lse else None
