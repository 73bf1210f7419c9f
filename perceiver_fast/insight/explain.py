"""Which way every layer of a model takes on an input, why not the others, and what it counts. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from perceiver_fast.backends import Choice
from perceiver_fast.insight import original
from perceiver_fast.insight.explanation import Explanation, LayerPath
from perceiver_fast.insight.original import wide_channels
from perceiver_fast.insight.recording import Recorder, Row, layers_of
from perceiver_fast.insight.shapes import shapes_mode
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.layers import Attention, FeedForward, PreNorm
from perceiver_fast.layers.pre_norm import is_cross_attention, why_modules
from perceiver_fast.ops.geglu import GEGLU
from perceiver_fast.ops.grid_scale import GRID_SCALE
from perceiver_fast.ops.layer_norm import LAYER_NORM
from perceiver_fast.ops.linear import choose_linear, product_dtype
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.work import Work
from perceiver_fast.tokens import DenseTokens, GridTokens, Tokens

__all__ = ["Explanation", "LayerPath", "explain"]


def explain(model: nn.Module, data, *args, **kwargs) -> Explanation:
    """Name the path each layer of ``model`` takes on an input, in its current mode and backend setting, and its work.

    The model's forward is run on tensors that have shapes and no content, so nothing is computed. Work is counted by
    the operators that are called (:mod:`perceiver_fast.insight.work` has the rules), of a forward that finds nothing kept from
    an earlier one. Beside it stands perceiver-pytorch's, counted in the same way.

    Args:
        model: any model of this package, or one that holds its layers; of :func:`perceiver_fast.insight.shapes.on_shapes`, too.
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
    like = next(model.parameters())
    mode = shapes_mode(list(model.parameters()), data, args, kwargs)
    # Not in inference mode, where operators are seen before torch takes them apart.
    with torch.inference_mode(False), torch.no_grad(), mode:
        fake = tree_map_only(Tensor, mode.from_tensor, (data, args, kwargs))
        with WorkCounter() as counter, Recorder(model, counter).attached() as recorder:
            model(fake[0], *fake[1], **fake[2])
        originals = [original.count_layer(row, like) for row in recorder.rows]
        inputs = _inputs(recorder)
    layers = [
        LayerPath(row.label, _choice(row, like), *_plan(row), operators=tuple(row.operators), original=work)
        for row, work in zip(recorder.rows, originals)
        if row.operators
    ]
    return Explanation(
        _describe(model, data),
        tuple(layers),
        _latents(recorder.rows, like),
        inputs,
        str(like.dtype).removeprefix("torch."),
        like.device.type,
    )


def _plan(row: Row) -> tuple:
    """Path, work and uses of a cross-attention."""
    if not row.attended:
        return ()
    plan = row.attended[0].plan
    return plan.path, plan.work, plan.uses


def _inner(row: Row) -> nn.Module:
    return row.module.fn if isinstance(row.module, PreNorm) else row.module


def _choice(row: Row, like: Tensor) -> Choice:
    """What runs a layer."""
    if row.attended:
        return row.attended[0].plan.choice
    inner = _inner(row)
    why = why_modules(row.module) if isinstance(row.module, PreNorm) else None
    if why is not None:
        return Choice(_op(inner), "torch", {"fused": [why]})
    if isinstance(inner, Attention):
        return Choice("self_attention", "sdpa")
    if isinstance(inner, FeedForward) and wide_channels(inner):
        return Choice("feed_forward", _linear(inner, row.calls[0].shape, like).backend.split(" ")[0])
    return Choice(type(inner).__name__, "torch")


def _op(inner: nn.Module) -> str:
    if isinstance(inner, Attention):
        return "self_attention"
    return "feed_forward" if isinstance(inner, FeedForward) else type(inner).__name__


def _linear(feed_forward: FeedForward, shape: Sequence[int], like: Tensor) -> Choice:
    *rows, channels = shape
    x = like.new_empty(1).expand(*rows, channels)  # its shape, dtype and device are what matters
    count = x.numel() // max(channels, 1)
    return choose_linear(count, channels, 2 * wide_channels(feed_forward), product_dtype(x), x.device)


def _latents(rows: list[Row], like: Tensor) -> tuple[Choice, ...]:
    for row in rows:
        inner = _inner(row)
        if isinstance(inner, FeedForward) and wide_channels(inner):
            x = like.new_empty(1).expand(row.calls[0].shape)
            call = PointwiseCall(product_dtype(x), x.device)
            return _linear(inner, row.calls[0].shape, like), GEGLU.choose(call), LAYER_NORM.choose(call)
    return ()


def _inputs(recorder: Recorder) -> tuple[LayerPath, ...]:
    operators = (*recorder.tokens.operators, *recorder.shared)
    work = original.count_tokens(recorder.described, total(recorder.tokens.operators))
    if not operators and work == Work():
        return ()
    choices = [_description(tokens) for tokens, _ in recorder.described]
    choice, *others = {choice.op: choice for choice in choices}.values()
    return (LayerPath("tokens", choice, uses=tuple(others), operators=operators, original=work),)


def _description(tokens: Tokens) -> Choice:
    if isinstance(tokens, GridTokens):
        return GRID_SCALE.choose(PointwiseCall(tokens.feat.dtype, tokens.feat.device))
    return Choice("layer_norm" if isinstance(tokens, DenseTokens) else "positions", "torch")


def _describe(model: nn.Module, data) -> str:
    latents = getattr(model, "latents", None)
    held = f"{latents.shape[0]} latents of {latents.shape[1]} channels; " if isinstance(latents, Tensor) else ""
    if not isinstance(data, Tensor):
        return f"{held}{type(data).__name__} of {len(data)}"
    width = getattr(model, "input_dim", data.shape[-1])
    sizes = data.shape[1:] if not data.is_floating_point() else data.shape[1:-1]
    return f"{held}{' x '.join(map(str, sizes))} tokens of {width} channels; batch {data.shape[0]}"
