"""Which path every attention layer of a model takes on an input, and why not the others. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perceiver_fast.backends import Choice
from perceiver_fast.layers import Attention, CrossAttention, FeedForward
from perceiver_fast.ops.geglu import PointwiseCall, choose_geglu
from perceiver_fast.ops.layer_norm import choose_layer_norm
from perceiver_fast.ops.linear import choose_linear, product_dtype
from perceiver_fast.tokens import TokenGroups


@dataclass(frozen=True)
class LayerPath:
    """One attention layer: its name in the model, the way taken, and the op and backend that run it.

    ``choice`` holds why other ways and backends were passed over, ``work`` the counted work of the ways that were open,
    and ``uses`` the ops that describe the tokens on this way.
    """

    layer: str
    choice: Choice
    path: str = ""
    work: dict = field(default_factory=dict)
    uses: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The paths of all attention layers of a model, in the order they run; ``str()`` of it is a table for people.

    ``latents`` says what runs the rest, by the first feed-forward: its products, GEGLU and LayerNorm.
    """

    tokens: str
    layers: tuple[LayerPath, ...]
    latents: tuple[Choice, ...] = ()

    def __str__(self) -> str:
        lines = [self.tokens]
        width = max((len(path.layer) for path in self.layers), default=0)
        for path in self.layers:
            work = f" ({path.path}: {path.work[path.path]})" if path.path in path.work else ""
            lines.append(f"{path.layer:<{width}}  {path.choice.op} on {path.choice.backend}{work}")
            for name, why in path.choice.rejected.items():
                lines.append(f"{'':<{width}}    not {name}: {'; '.join(why)}")
            for use in path.uses:
                lines.append(f"{'':<{width}}    with {use.op} on {use.backend}")
                if use.backend == "reference":
                    lines += [f"{'':<{width}}      not {n}: {'; '.join(why)}" for n, why in use.rejected.items()]
        for choice in self.latents:
            lines.append(f"{choice.op} of the latents on {choice.backend}")
            lines += [f"  not {name}: {'; '.join(why)}" for name, why in choice.rejected.items()]
        return "\n".join(lines)


def explain(model: nn.Module, data, *args, **kwargs) -> Explanation:
    """Name the path each attention layer of ``model`` takes on an input, in its current mode and backend setting.

    The model's forward is run on tensors that have shapes and no content, so nothing is computed.

    Args:
        model: any model of this package, or one that holds its layers.
        data, *args, **kwargs: as its forward takes them; only shapes, dtypes and devices matter.

    Returns:
        Explanation: print it, or read its ``layers``.

    Raises:
        TypeError, ValueError: as the model's forward; and for a model without a layer of this package.
        perceiver_fast.backends.BackendError: a forced backend cannot run a layer.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> pf.explain(model, torch.randn(1, 6, 6, 3)).layers[0].choice.op
        'grid_attention'
    """
    attention = {name: m for name, m in model.named_modules() if isinstance(m, (CrossAttention, Attention))}
    inner = {id(m.fn) for m in attention.values() if isinstance(m, CrossAttention)}  # their projections
    layers = {name: m for name, m in attention.items() if id(m) not in inner}
    if not any(isinstance(m, CrossAttention) for m in layers.values()):
        raise TypeError(f"explain: expected a perceiver_fast model, got {type(model).__name__}")
    paths: list[LayerPath] = []
    names = _names(model, layers)

    def record(module, inputs, keywords):
        name = next(names[id(module)], None)
        if name is None:  # called again under its last name, as a decoder is for every part of its queries
            return
        if isinstance(module, Attention):
            paths.append(LayerPath(name, Choice("self_attention", "sdpa")))
            return
        x, tokens = inputs[:2]
        grouped = isinstance(tokens, TokenGroups)
        for i, group in enumerate(tokens.groups if grouped else [tokens]):
            mask = tokens.masks[i] if grouped else keywords.get("mask", next(iter(inputs[2:]), None))
            plan = module.plan(group, x.shape[1], keywords.get("inverted", False), grouped, mask is not None)
            label = f"{name} [{i}]" if grouped else name
            paths.append(LayerPath(label, plan.choice, plan.path, plan.work, plan.uses))

    shapes: list[tuple[torch.Size, int]] = []  # of feed-forwards' inputs, and how wide they become
    feed_forwards = [m for m in model.modules() if isinstance(m, FeedForward)]
    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in set(layers.values())]
    handles += [
        m.register_forward_pre_hook(lambda m, inputs: shapes.append((inputs[0].shape, m.net[2].in_features)))
        for m in feed_forwards
        if hasattr(m.net[2], "in_features")
    ]
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (data, args, kwargs))
            model(fake[0], *fake[1], **fake[2])
    finally:
        for handle in handles:
            handle.remove()
    return Explanation(_describe(model, data), tuple(paths), _latents(model, shapes))


def _latents(model: nn.Module, shapes: list[tuple[torch.Size, int]]) -> tuple[Choice, ...]:
    if not shapes:
        return ()
    parameter = next(model.parameters())
    (*rows, channels), wide = shapes[0]
    x = parameter.new_empty(1).expand(*rows, channels)  # its shape, dtype and device are what matters
    dtype = product_dtype(x)
    linear = choose_linear(x.numel() // max(channels, 1), channels, 2 * wide, dtype, x.device)
    call = PointwiseCall(dtype, x.device)
    return linear, choose_geglu(call), choose_layer_norm(call)


def _names(model: nn.Module, layers: dict[str, nn.Module]) -> dict[int, object]:
    """For every module an iterator over its names: a shared one has several, in the order it runs under them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(module is layer for layer in layers.values()):
            names.setdefault(id(module), []).append(name)
    return {key: iter(of) for key, of in names.items()}


def _describe(model: nn.Module, data) -> str:
    latents = getattr(model, "latents", None)
    held = f"{latents.shape[0]} latents of {latents.shape[1]} channels; " if isinstance(latents, Tensor) else ""
    if not isinstance(data, Tensor):
        return f"{held}{type(data).__name__} of {len(data)}"
    width = getattr(model, "input_dim", data.shape[-1])
    sizes = data.shape[1:] if not data.is_floating_point() else data.shape[1:-1]
    return f"{held}{' x '.join(map(str, sizes))} tokens of {width} channels; batch {data.shape[0]}"
