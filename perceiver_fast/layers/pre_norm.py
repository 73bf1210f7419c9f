"""LayerNorm before a layer, as perceiver-pytorch has it, and how such layers are added to a residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perceiver_fast.layers import without_dropout
from perceiver_fast.layers.attention import Attention
from perceiver_fast.layers.cross_attention import cross_attention_branch, describe_context, why_cross_attention_modules
from perceiver_fast.layers.described import describe_keywords
from perceiver_fast.layers.feed_forward import FeedForward
from perceiver_fast.layers.fusing import are_plain, fusable, hides_keywords, is_watched, watcher, why_not
from perceiver_fast.layers.grid_cross_attention import add_grid_cross_attention
from perceiver_fast.layers.latent_cross_attention import latent_cross_attention_branch
from perceiver_fast.layers.observer import observer
from perceiver_fast.layers.residual_stream import ResidualStream, normalize, with_bias
from perceiver_fast.shards.shard import calling
from perceiver_fast.tokens import DenseTokens, Description, TokenGroups, Tokens, TokenStream

if TYPE_CHECKING:
    from perceiver_fast.shards.shard import Shard

BRANCHES = (Attention, without_dropout.Attention, FeedForward, without_dropout.FeedForward)  # classes with a branch()
CROSS_KEYWORDS = frozenset(("context", "mask", "inverted_attention"))


@fusable
class PreNorm(nn.Module):
    """``fn(LayerNorm(x), ..)``; with a context_dim, ``fn(LayerNorm(x), context=LayerNorm(context), ..)``.

    Args:
        dim: channels of x.
        fn: the layer.
        context_dim: channels of the context. Default: None, fn takes no context.

    Source:
        perceiver-pytorch 0.11.0.

    Example:
        >>> import torch
        >>> from perceiver_fast.layers import Attention, PreNorm
        >>> layer = PreNorm(8, Attention(8, 12), context_dim=12)
        >>> layer(torch.randn(2, 5, 8), context=torch.randn(2, 30, 12)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, fn: nn.Module, context_dim: int | None = None):
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(dim)
        self.norm_context = None if context_dim is None else nn.LayerNorm(context_dim)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Normalise, and call ``fn``.

        Args:
            x: ``[B, N, D]``; with a context also ``[1, N, D]``, when the whole batch shares them.
            **kwargs: what ``fn`` takes beside them, such as ``context [B, M, C]``, or a description of that by
                :func:`perceiver_fast.grid_tokens` or :func:`perceiver_fast.point_tokens`. (The models of this package
                pass one of their own if nobody but this forward sees it.)

        Returns:
            What ``fn`` returns.

        Raises:
            TypeError, ValueError: in a cross-attention, x, context or mask of wrong dtype, rank, size or device.
        """
        if isinstance(kwargs.get("context"), Description) and self._modules.get("norm_context") is not None:
            kwargs = describe_keywords(type(self).__name__, self, x, kwargs)
        watched = is_watched(x)
        if not watched and CROSS_KEYWORDS.issuperset(kwargs):
            stream = ResidualStream(x)
            found = _context_of(self, stream, **kwargs, who=type(self).__name__)
            if found is not None:
                y = latent_cross_attention_branch(self, stream, *found, adds=False)
                return with_bias(*cross_attention_branch(self, stream, *found)) if y is None else y
        looks = observer()
        if looks is not None:
            looks.begins(self, x.shape, residual=False)
        fn: Any = self._modules["fn"]
        fused = not watched and why_not("fn", fn, *BRANCHES) is None and fn.why_modules() is None
        z = normalize(self.norm, x) if fused else self.norm(x)
        if self.norm_context is not None:
            if looks is not None:
                context = kwargs["context"]
                tokens = DenseTokens(context) if isinstance(context, Tensor) else context
                looks.attends(self, z, tokens, kwargs.get("mask"), kwargs.get("inverted_attention", False), fused=False)
            if (shard := getattr(kwargs["context"], "shard", None)) is not None:
                return call_on_shard(self, shard, z, kwargs)
            kwargs = as_tensors(kwargs)
            kwargs.update(context=self.norm_context(kwargs["context"]))
        return self.fn(z, **kwargs)


def _context_of(
    layer: nn.Module,
    stream: ResidualStream,
    context: Tensor | Tokens | TokenGroups | TokenStream | None = None,
    mask: Tensor | None = None,
    inverted_attention: bool = False,
    *,
    who: str,
    residual: bool = False,
) -> tuple[Tokens | TokenGroups | TokenStream, Tensor | None, bool] | None:
    """What a fused op attends to in the place of ``layer``; None if the layers inside have to be called.

    Args:
        layer: a PreNorm.
        stream: the latents.
        context, mask, inverted_attention: see :meth:`PerceiverBlock.forward`.
        who: the module that the user called, for messages.
        residual: whether the result is added to the stream, which an observer is told.

    Returns:
        A description of the context, its mask, and whether attention is inverted.
    """
    if context is None or layer._modules.get("norm_context") is None:
        return None
    if isinstance(context, Tensor):
        sources: tuple[Tensor, ...] = (context,)
    else:
        if isinstance(context, Tokens) and not torch.compiler.is_compiling() and context.was_changed():
            context = DenseTokens(context.tensor())
        sources = context.sources()
    if not are_plain(mask, *sources):
        return None
    if why_cross_attention_modules(layer) is not None:
        return None
    tokens, mask = describe_context(who, layer, stream.value(), context, mask)
    if (looks := observer()) is not None:
        looks.begins(layer, stream.shape, residual)
    return tokens, mask, inverted_attention


def as_tensors(keywords: dict) -> dict:
    """``keywords`` with tensors, as perceiver-pytorch has them, in the place of a description of tokens.

    Args:
        keywords: may have a ``context``, a tensor or a description; the masks of TokenGroups become the ``mask``.
    """
    context = keywords.get("context")
    if getattr(context, "shard", None) is not None:
        raise RuntimeError(
            "shard: expected the package's own layers where sharded tokens are attended to, without hooks that see keyword "
            "arguments, global hooks or modes, got a layer that would take this process' tokens for all there are; remove "
            "these, or unshard the model"
        )
    if isinstance(context, TokenGroups):
        return keywords | {"context": context.tensor(), "mask": context.mask()}
    return keywords | {"context": context.tensor()} if isinstance(context, (Tokens, TokenStream)) else keywords


def call_on_shard(layer: nn.Module, shard: Shard, z: Tensor, keywords: dict) -> Tensor:
    """A PreNorm's attention whose layers have to be called, to tokens of which this process has a part.

    The layers on the tokens' side are called on this process' tokens, with parameters whose gradients are summed over the
    processes; the attention merges what they find.
    """
    modules: dict[str, Any] = layer._modules
    fn, context, mask = modules["fn"], keywords["context"], keywords.get("mask")
    first = context.first if isinstance(context, Tokens) else None
    if isinstance(context, TokenGroups):
        mask = context.mask()
    norm_context, to_kv = modules["norm_context"], getattr(fn, "to_kv", None)
    with shard.local_parameters(norm_context, to_kv), calling(shard, first, fn) as called:
        context = norm_context(context.tensor())
        out = fn(z, **keywords | {"context": context, "mask": mask})
    if not called.asked:
        raise RuntimeError(
            f"shard: expected a perceiver_fast.layers.Attention as fn of a PreNorm, got {type(fn).__name__}, which attended to "
            "this process' tokens alone; unshard the model"
        )
    return out


def keywords_for(module: nn.Module, kind: type[nn.Module], keywords: dict) -> dict:
    """The keywords to call ``module`` with: a description of tokens is passed on only to a forward that takes it.

    If anybody else would see the keywords, such as a hook, they hold the tensor that is described.

    Args:
        module: what is called.
        kind: the class whose forward takes descriptions.
        keywords: ``context``, a tensor ``[B, M, C]`` or a description of one, and others.
    """
    return keywords if watcher() is None and hides_keywords(module, kind.forward) else as_tensors(keywords)


def add_cross_attention(stream: ResidualStream, layer: nn.Module, watched: bool, who: str, **keywords: Any) -> None:
    """Add ``layer(x, context=context, ..)`` to a stream x: by a fused op if ``layer`` is plain, else it is called.

    Args:
        stream: what the result is added to.
        layer: a PreNorm with a context, or whatever was put in its place.
        watched: whether modules have to be called in any case: see :func:`perceiver_fast.layers.fusing.is_watched`.
        who: the module that the user called, for messages.
        **keywords: ``context``, a tensor ``[B, M, C]`` or a description of one, and the others that perceiver-pytorch
            passes.
    """
    if not watched and why_not("layer", layer, PreNorm) is None:
        if add_grid_cross_attention(
            stream, layer, keywords.get("context"), keywords.get("mask"), keywords.get("inverted_attention", False)
        ):
            return
        found = _context_of(layer, stream, **keywords, who=who, residual=True)
        if found is not None:
            y = latent_cross_attention_branch(layer, stream, *found, adds=True)
            if y is None:
                stream.add(*cross_attention_branch(layer, stream, *found))
            else:
                stream.become(y)
            return
    stream.add_output(layer(stream.value(), **keywords_for(layer, PreNorm, keywords)))


def add_layer(stream: ResidualStream, layer: nn.Module, watched: bool, **keywords: Any) -> None:
    """Add ``layer(x, ..)`` to a stream x: by a fused op if ``layer`` is a plain :class:`PreNorm`, else it is called.

    Args:
        stream: what the result is added to.
        layer: a PreNorm without context, or whatever was put in its place.
        watched: whether modules have to be called in any case: see :func:`perceiver_fast.layers.fusing.is_watched`.
        **keywords: of the layer.
    """
    modules: dict[str, Any] = layer._modules
    if watched or why_not("layer", layer, PreNorm) is not None or modules.get("norm_context") is not None:
        stream.add_output(layer(stream.value(), **keywords))
        return
    if (looks := observer()) is not None:
        looks.begins(layer, stream.shape, residual=True)
    fn, norm = modules["fn"], modules["norm"]
    if not keywords and why_not("fn", fn, *BRANCHES) is None and fn.why_modules() is None:
        stream.add(*fn.branch(stream.normalized(norm)))
    else:
        stream.add_output(fn(norm(stream.value()), **keywords))


def is_cross_attention(module: nn.Module) -> bool:
    """Whether ``module`` is a PreNorm that attends to a context."""
    return isinstance(module, PreNorm) and module.norm_context is not None


class Residual(nn.Module):
    """``x + fn(x, ..)``.

    Args:
        fn: the layer.

    Source:
        perceiver-pytorch 0.11.0.
    """

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """``[B, N, D]`` to ``[B, N, D]``; ``kwargs`` are what ``fn`` takes beside x."""
        stream = ResidualStream(x)
        add_layer(stream, self.fn, is_watched(x), **kwargs)
        return stream.value()


def why_modules(layer: nn.Module) -> str | None:
    """Why the layers of a PreNorm have to be called one by one, in words; None if a fused op may stand in for them."""
    found = watcher() or why_not("it", layer, PreNorm)
    if found is not None:
        return found
    if layer.norm_context is not None:
        return why_cross_attention_modules(layer)
    found = why_not("fn", layer.fn, *BRANCHES)
    return layer.fn.why_modules() if found is None else found
