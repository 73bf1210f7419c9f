"""Which way every layer of a model takes on an input, why not the others, and what it counts. Computes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from perceiver_fast.backends import Choice
from perceiver_fast.insight.explanation import Explanation, LayerPath
from perceiver_fast.insight.observe import layers_of
from perceiver_fast.insight.original import count_layer, count_tokens, wide_channels
from perceiver_fast.insight.recording import Recorder, Row
from perceiver_fast.insight.shapes import shapes_mode
from perceiver_fast.insight.whole import check_whole
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.layers import Attention, FeedForward, PreNorm
from perceiver_fast.layers.plan import Plan
from perceiver_fast.layers.pre_norm import is_cross_attention, why_modules
from perceiver_fast.ops.geglu import GEGLU
from perceiver_fast.ops.grid_scale import GRID_SCALE
from perceiver_fast.ops.layer_norm import LAYER_NORM
from perceiver_fast.ops.linear import large_library, linear_library, product_dtype
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.self_attention import self_attention_backend
from perceiver_fast.ops.work import Work
from perceiver_fast.tokens import DenseTokens, Description, EmbeddedGrid, GridTokens, Tokens

__all__ = ["Explanation", "LayerPath", "explain"]


def explain(model: nn.Module, data: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Name the path each layer of ``model`` takes on an input, in its current mode and backend setting, and its work.

    The model's forward is run on tensors that have shapes and no content, so nothing is computed. Work is counted by
    the operators that are called (:mod:`perceiver_fast.insight.work` has the rules). Beside it stands perceiver-pytorch's,
    counted in the same way. Other threads may call the model, or explain it, meanwhile.

    Args:
        model: any model of this package, or one that holds its layers; also one of
            :func:`perceiver_fast.insight.shapes.on_shapes`.
        data, *args, **kwargs: as its forward takes them; only shapes, dtypes and devices matter.

    Returns:
        Explanation: print it, or read its ``layers``, ``multiply_adds``, ``exponentials`` and ``bytes``.

    Raises:
        TypeError, ValueError: as the model's forward; and for a model without a layer of this package.
        perceiver_fast.backends.BackendError: a forced backend cannot run a layer.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> found = pf.explain(model, torch.randn(1, 6, 6, 3))
        >>> found.layers[0].choice.op, found.layers[0].path
        ('grid_attention', 'grid')
        >>> found.multiply_adds < found.original.multiply_adds
        True
    """
    if not any(is_cross_attention(module) for _, module in layers_of(model)):
        raise TypeError(f"explain: expected a perceiver_fast model, got {type(model).__name__}")
    check_whole("explain", model, data)
    like = next(model.parameters())
    mode = shapes_mode(list(model.parameters()), data, args, kwargs)
    # Not in inference mode, where operators are seen before torch takes them apart.
    with torch.inference_mode(False), torch.no_grad(), mode:
        fake_data, fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (data, args, kwargs))
        with WorkCounter() as counter, Recorder(model, counter).attached() as recorder:
            model(fake_data, *fake_args, **fake_kwargs)
        rows = [(row, count_layer(row, like)) for row in recorder.rows if row.operators]
        inputs = _inputs(recorder)
    return Explanation(
        tokens=_in_words(model, data),
        layers=tuple(LayerPath(row.label, _plan(row, like), tuple(row.operators), work) for row, work in rows),
        latents=_latents(recorder.rows, like),
        inputs=inputs,
        dtype=str(like.dtype).removeprefix("torch."),
        device=like.device.type,
    )


def _plan(row: Row, like: Tensor) -> Plan:
    """Which way a layer takes and what runs it."""
    if row.plan is not None:  # which library is compared on real tensors, and so it was not asked for on the way
        uses = tuple(large_library(torch.float32) if use.op == "linear" else use for use in row.plan.uses)
        return replace(row.plan, uses=uses)
    layer: Any = row.inner
    op, backend = type(layer).__name__, "torch"
    if isinstance(layer, Attention):
        x = _stream(row, like)
        op, backend = "self_attention", self_attention_backend(product_dtype(x), x.device)
    elif isinstance(layer, FeedForward):
        op = "feed_forward"
    why = why_modules(row.module) if isinstance(row.module, PreNorm) else None
    if why is not None:
        return Plan("", Choice(op, "torch", {"fused": [why]}))
    if op == "feed_forward" and wide_channels(layer):
        backend = (_linear(row, _stream(row, like)).backend or "").split(" ")[0]
    return Plan("", Choice(op, backend))


def _stream(row: Row, like: Tensor) -> Tensor:
    """Something with the shape, dtype and device of what a layer is called with, in no memory."""
    shape: Any = row.calls[0].shape  # layers with a norm say it
    return like.new_empty(1).expand(shape)


def _linear(row: Row, x: Tensor) -> Choice:
    """What runs the first product of a feed-forward on ``x``."""
    layer: Any = row.inner
    count, channels, wide = x.shape[:-1].numel(), x.shape[-1], wide_channels(layer) or 0
    return linear_library(count, channels, 2 * wide, product_dtype(x), x.device)


def _latents(rows: list[Row], like: Tensor) -> tuple[Choice, ...]:
    """What runs the products, GEGLU and LayerNorm of the first feed-forward."""
    for row in rows:
        if isinstance(row.inner, FeedForward) and wide_channels(row.inner):
            x = _stream(row, like)
            call = PointwiseCall(product_dtype(x), x.device)
            return _linear(row, x), GEGLU.choose(call), LAYER_NORM.choose(call)
    return ()


def _inputs(recorder: Recorder) -> tuple[LayerPath, ...]:
    """The line of what describes the tokens, if anything does."""
    operators = (*recorder.tokens.operators, *recorder.shared)
    work = count_tokens(recorder.described, total(recorder.tokens.operators))
    if not operators and work == Work():
        return ()
    choices = [_description(tokens) for tokens, _ in recorder.described]
    choice, *others = {choice.op: choice for choice in choices}.values()
    return (LayerPath("tokens", Plan("", choice, uses=tuple(others)), operators, work),)


def _description(tokens: Tokens) -> Choice:
    """What describes tokens for all layers."""
    if isinstance(tokens, GridTokens) and not isinstance(tokens, EmbeddedGrid):
        return GRID_SCALE.choose(PointwiseCall(tokens.feat.dtype, tokens.feat.device))
    return tokens.normalized_by() if isinstance(tokens, DenseTokens) else Choice("positions", "torch")


def _in_words(model: nn.Module, data) -> str:
    """Latents and tokens, for people."""
    latents = getattr(model, "latents", None)
    held = f"{latents.shape[0]} latents of {latents.shape[1]} channels; " if isinstance(latents, Tensor) else ""
    if isinstance(data, Description):
        return (
            f"{held}{' x '.join(map(str, data.sizes))} described tokens of {data.channels} channels; batch {data.batch}"
        )
    if not isinstance(data, Tensor):
        return f"{held}{type(data).__name__} of {len(data)}"
    width = getattr(model, "input_dim", data.shape[-1])
    sizes = data.shape[1:] if not data.is_floating_point() else data.shape[1:-1]
    return f"{held}{' x '.join(map(str, sizes))} tokens of {width} channels; batch {data.shape[0]}"
