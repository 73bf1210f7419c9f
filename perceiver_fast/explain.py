"""Which path every layer of a model takes on an input, and why not the others. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver_fast.backends import Choice
from perceiver_fast.models.inputs import check_inputs


@dataclass(frozen=True)
class LayerPath:
    """One attention layer: its name in the model, its op and backend, and why others were passed over."""

    layer: str
    choice: Choice


@dataclass(frozen=True)
class Explanation:
    """The paths of all attention layers of a model; ``str()`` of it is a table for people."""

    tokens: str
    layers: tuple[LayerPath, ...]

    def __str__(self) -> str:
        lines = [self.tokens]
        width = max((len(path.layer) for path in self.layers), default=0)
        for path in self.layers:
            lines.append(f"{path.layer:<{width}}  {path.choice.op} on {path.choice.backend}")
            for name, why in path.choice.rejected.items():
                lines.append(f"{'':<{width}}    not {name}: {'; '.join(why)}")
        return "\n".join(lines)


def explain(model: nn.Module, data: Tensor, mask: Tensor | None = None) -> Explanation:
    """Name the path each attention layer of ``model`` takes on ``data``, in its current mode and backend setting.

    Args:
        model: a :class:`perceiver_fast.Perceiver`.
        data, mask: as its forward takes them; only shapes, dtypes and devices matter.

    Returns:
        Explanation: print it, or read its ``layers``.

    Raises:
        TypeError, ValueError: as the model's forward; and for a model of another library.
        perceiver_fast.backends.BackendError: a forced backend cannot run a layer.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> pf.explain(model, torch.randn(1, 6, 6, 3)).layers[0].choice.op
        'grid_attention'
    """
    if not (hasattr(model, "describe") and hasattr(model, "layers")):
        raise TypeError(f"explain: expected a perceiver_fast model, got {type(model).__name__}")
    check_inputs(model, data, mask)
    with torch.no_grad():
        tokens = model.describe(data)
    latents, dim = model.latents.shape
    paths = []
    for i, (block, inverted) in enumerate(zip(model.layers, model.inverted_cross_attn)):
        paths.append(LayerPath(f"layers.{i}.cross_attn", block.cross_attn.plan(tokens, inverted)))
        paths += [
            LayerPath(f"layers.{i}.self_attns.{j}.0", Choice("self_attention", "sdpa"))
            for j in range(len(block.self_attns))
        ]
    grid = " x ".join(map(str, data.shape[1:-1]))
    text = f"{latents} latents of {dim} channels; {grid} tokens of {model.input_dim} channels; batch {data.shape[0]}"
    return Explanation(text, tuple(paths))
