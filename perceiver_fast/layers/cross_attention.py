"""Cross-attention of the latents to described tokens, with PreNorm of both sides, as one function of parameters.

This is where the package's kernels are used. layers/plan.py decides which of three ways a call takes, and
layers/cross_attention_ways.py has the ways.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.float64 import lse_of
from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.checks import check_data, check_mask
from perceiver_fast.layers.cross_attention_parameters import CrossAttentionParameters
from perceiver_fast.layers.cross_attention_ways import WAYS
from perceiver_fast.layers.fusing import is_plain, why_not
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.plan import Layer, Plan, plan_cross_attention
from perceiver_fast.layers.residual_stream import ResidualStream
from perceiver_fast.layers.streaming import attend_stream
from perceiver_fast.ops.library import compute_dtype
from perceiver_fast.ops.linear import product_dtype
from perceiver_fast.ranges import layer_range
from perceiver_fast.reference.softmax import EMPTY_LSE
from perceiver_fast.tokens import DenseTokens, TokenGroups, Tokens, TokenStream, is_read, merge_parts
from perceiver_fast.tracing import trainable

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard


def why_cross_attention_modules(layer: nn.Module) -> str | None:
    """Why :func:`cross_attention_branch` may not stand in for the layers of a PreNorm with a context; None if it may.

    The tokens' side (``norm_context``, ``to_kv`` and the dropout of weights) has to be plain, see layers/fusing.py. The
    latents' side (``norm``, ``to_q``, ``to_out``) need not be: what is not plain there is called.
    """
    modules: dict[str, Any] = layer._modules
    fn = modules["fn"]
    norm_context: Any = modules.get("norm_context")
    found = why_not("fn", fn, Attention, without_dropout.Attention)
    if found is not None:
        return found
    to_kv = fn._modules["to_kv"]
    found = (
        why_not("norm_context", norm_context, nn.LayerNorm) or why_not("fn.to_kv", to_kv, nn.Linear) or fn.why_weights()
    )
    if found is None and norm_context._parameters["bias"] is None:
        return "norm_context has no bias"
    if found is None and to_kv._parameters["bias"] is not None:
        return "fn.to_kv has a bias"
    return found


def describe_context(
    who: str, layer: nn.Module, x: Tensor, context: Tensor | Tokens | TokenGroups | TokenStream, mask: Tensor | None
) -> tuple[Tokens | TokenGroups | TokenStream, Tensor | None]:
    """A description of a context, and its mask, after checks of both.

    A context that is a description already is returned as it is: it comes from a model, which has checked its input.

    Args:
        who: the module that the user called, for messages.
        layer: the PreNorm that attends to the context.
        x: latents ``[B, N, D]``.
        context: ``[B, M, C]``, or a description.
        mask: bool ``[B, M]`` or ``[1, M]``, True where a token may be attended to; or None.

    Returns:
        The description, and the mask for the whole batch.

    Raises:
        TypeError, ValueError: a wrong type, dtype, rank, size or device; the message says expected, got and what to do.
    """
    if isinstance(context, (Tokens, TokenGroups, TokenStream)):
        return context, mask
    norm: Any = layer.norm
    norm_context: Any = layer.norm_context
    width, channels = (
        getattr(n, "normalized_shape", (t.shape[-1],))[-1] for n, t in ((norm, x), (norm_context, context))
    )
    check_data(who, "x", x, norm_context.weight, axes=1, channels=width, channels_argument="dim")
    check_data(who, "context", context, norm_context.weight, axes=1, channels=channels, channels_argument="context_dim")
    if x.shape[0] != 1 and x.shape[0] != context.shape[0]:
        raise ValueError(
            f"{who}: expected x for a batch of {context.shape[0]}, like context, got {tuple(x.shape)}; "
            "give both the same batch"
        )
    return DenseTokens(trainable(context)), check_mask(who, mask, "context", context, context.shape[1:-1])


@layer_range
def cross_attention_branch(
    layer: nn.Module,
    stream: ResidualStream,
    tokens: Tokens | TokenGroups | TokenStream,
    mask: Tensor | None,
    inverted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend, in the place of ``layer`` and the layers inside; only where :func:`why_cross_attention_modules` is None.

    Args:
        layer: a PreNorm with a context.
        stream: the latents.
        tokens: what is attended to.
        mask: bool ``[B, M]`` or ``[B, *sizes]``, True where a token may be attended to; or None. TokenGroups have masks
            of their own.
        inverted: softmax over the latents, then normalised over the tokens.

    Returns:
        ``[B, N, D]`` before the bias of ``to_out``, and the bias; if ``to_out`` has to be called, its result and None.
    """
    return FusedCrossAttention(layer).attend(stream, tokens, mask, inverted)


class FusedCrossAttention(CrossAttentionParameters):
    """One call of a cross-attention that is computed from the parameters of a PreNorm with a context.

    Args:
        layer: the PreNorm; ``layer.fn`` is the attention.
    """

    def plan(
        self, tokens: Tokens, queries: int, inverted: bool = False, lse: bool = False, masked: bool = False
    ) -> Plan:
        """The way that a forward takes in the current mode, and why not the others.

        Args:
            tokens: what is attended to.
            queries: number of latents, N.
            inverted: softmax over the latents, then normalised over the tokens. Default: False.
            lse: whether the log-sum-exp is needed, as it is to merge groups of tokens. Default: False.
            masked: whether there is a mask. Default: False.

        Raises:
            perceiver_fast.backends.BackendError: a forced backend cannot run it.
        """
        fn = self.fn
        return plan_cross_attention(
            tokens,
            Layer(queries, fn.heads, self.dim_head, fn.active_dropout, inverted, lse, fn.queries_contribute_kv, masked),
        )

    def attend(
        self, stream: ResidualStream, tokens: Tokens | TokenGroups | TokenStream, mask: Tensor | None, inverted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See :func:`cross_attention_branch`."""
        z = self._normalized(stream)
        if (looks := observer()) is not None:
            if tokens.shard is not None or isinstance(tokens, TokenStream):
                raise RuntimeError(
                    "expected to look at a layer that attends to all tokens of a tensor, got sharded or streamed tokens; "
                    "look at the model before shard, or after unshard, on a tensor"
                )
            looks.attends(self.layer, z, tokens, mask, inverted)
        out, _ = (
            self._attend(z, tokens, mask, inverted)
            if tokens.shard is None
            else self._attend_shard(tokens.shard, z, tokens, mask, inverted)
        )
        return self.fn.project_out(out.flatten(2).to(product_dtype(z)))

    def _normalized(self, stream: ResidualStream) -> Tensor:
        """LayerNorm of the stream ``[B, N, D]``, or of one row ``[1, N, D]`` as long as the whole batch shares it."""
        if not is_plain(self.fn._modules["to_q"], nn.Linear):  # it is called, so it gets the whole batch
            return self.norm(stream.value())
        return stream.normalized(self.norm)

    def _attend_shard(
        self, shard: Shard, z: Tensor, tokens: Tokens | TokenGroups | TokenStream, mask: Tensor | None, inverted: bool
    ) -> tuple[Tensor, None]:
        """Attend to this process' tokens, and merge with what the others found."""
        self.check_parts()
        part = self.of_tensors(*shard.local(*self.tensors(z)))
        # Reading may fail on one process, and then on all.
        with shard.together("stream", z.device) if is_read(tokens) else nullcontext():
            found: Any = part._attend(z, tokens, mask, inverted, with_lse=True)
        out, lse = found
        return shard.merge(out, lse, tokens.count, inverted), None

    def check_parts(self) -> None:
        """Raise ValueError where attention to tokens in parts has no meaning."""
        if self.fn.queries_contribute_kv:
            raise ValueError(
                "PreNorm: expected attention to tokens alone, got queries_contribute_kv with tokens in groups, sharded or "
                "streamed; join them into one tensor"
            )

    def _attend(
        self,
        z: Tensor,
        tokens: Tokens | TokenGroups | TokenStream,
        mask: Tensor | None,
        inverted: bool = False,
        with_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to a description on the way that is planned; see layers/cross_attention_ways.py."""
        if tokens.count == 0:  # a process may have none
            return self._attend_nothing(z, tokens)
        if isinstance(tokens, TokenStream):
            self.check_parts()
            return attend_stream(self, z, tokens, inverted)
        if isinstance(tokens, TokenGroups):
            return self._attend_groups(z, tokens, inverted)
        plan = self.plan(tokens, z.shape[1], inverted, with_lse, mask is not None)
        if (looks := observer()) is not None:
            looks.plans(self.layer, z, tokens, mask, inverted, with_lse, plan)  # only groups need a log-sum-exp
        mask = None if mask is None else mask.flatten(1)
        return WAYS[plan.path](self, z, tokens, mask, inverted, with_lse, plan.taken.backend)

    def _attend_groups(self, z: Tensor, tokens: TokenGroups, inverted: bool) -> tuple[Tensor, Tensor]:
        """Attend to every group by itself and merge the results, ``[B, N, H, d]`` and ``[B, N, H]``."""
        self.check_parts()
        results: list[Any] = [
            self._attend(z, group, mask, inverted, with_lse=True) for group, mask in zip(tokens.groups, tokens.masks)
        ]
        outs, lses = zip(*results)
        return merge_parts(outs, lses, [group.count for group in tokens.groups], inverted)

    def _attend_nothing(self, z: Tensor, tokens: Tokens | TokenGroups | TokenStream) -> tuple[Tensor, Tensor]:
        """Attention to no token: zeros of no weight, with gradients of zero to all that attention depends on."""
        self.seed(0, z.device)  # it is drawn, as the other processes draw it
        compute = compute_dtype(z.dtype)
        tensors = (*self.tensors(z), *(t for t in tokens.sources() if t.requires_grad))
        zero = sum((t.flatten()[:0].sum().to(compute) for t in tensors), z.new_zeros((), dtype=compute))
        out = z.new_zeros(tokens.batch, z.shape[1], self.fn.heads, self.dim_head, dtype=compute) + zero
        return out, lse_of(torch.full_like(out[..., 0], EMPTY_LSE)) + lse_of(zero)
