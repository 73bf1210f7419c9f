"""The demo's picture: where a few latents look in a photograph."""

from __future__ import annotations

import textwrap
from pathlib import Path

from torch import Tensor, nn

from perceiver_fast.attention_map import attention_map
from perceiver_fast.commands.demo_process import Report

CHUNK = 8  # latents whose maps are formed at once


def contrasting_maps(model: nn.Module, photo: Tensor, candidates: int, count: int, report: Report) -> dict[int, Tensor]:
    """Attention maps of the latents, of the first ``candidates``, whose maps vary most, the most first.

    Args:
        model: a :class:`perceiver_fast.Perceiver` with one cross-attention head.
        photo: ``[1, H, W, 3]``.
        candidates, count: latents looked at and latents kept.
        report: called with a line of progress.

    Returns:
        dict: latent to ``[H, W]``, attention over uniform attention: 1 on average.
    """
    best: dict[int, Tensor] = {}
    candidates = min(candidates, model.latents.shape[0])
    for start in range(0, candidates, CHUNK):
        latents = list(range(start, min(start + CHUNK, candidates)))
        report(f"picture: looking at latents {latents[0]} to {latents[-1]}")
        maps = attention_map(model, photo, latents=latents)[0, 0]
        best |= dict(zip(latents, maps * maps[0].numel()))
        kept = sorted(best, key=lambda latent: float(best[latent].var(correction=0)), reverse=True)[:count]
        best = {latent: best[latent].clone() for latent in kept}  # of this chunk's memory only what is kept
    return best


def draw(photo: Tensor, maps: dict[int, Tensor], caption: str, path: Path) -> None:
    """Save the photograph and, over it in grey, every map, each on its own logarithmic colour scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    image = photo[0].numpy()
    grey = image @ [0.299, 0.587, 0.114]  # luma, ITU-R BT.601
    rows, columns, title = 2, -(-len(maps) // 2), 0.3  # the photograph is as high as two maps and a title between them
    aspect = min(max(image.shape[0] / image.shape[1], 0.4), 2.0)  # of a panel; titles need some width
    width = (6.0 / aspect) ** 0.5  # inches; six square inches a map, whatever its shape
    height = width * aspect
    widths = [(rows * height + title) / aspect, *columns * [width]]
    lines = textwrap.wrap(caption, width=int(13 * sum(widths)))  # about 13 characters an inch
    size = sum(widths), rows * (height + title) + 0.2 * len(lines) + 0.2
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.add_gridspec(rows, 1 + columns, width_ratios=widths)

    panel = figure.add_subplot(grid[:, 0])
    panel.imshow(image)
    panel.set_title(f"the photograph: {image.shape[0]} x {image.shape[1]} tokens", fontsize="medium")
    panel.set_axis_off()
    for i, (latent, values) in enumerate(maps.items()):
        panel = figure.add_subplot(grid[i // columns, 1 + i % columns])
        panel.imshow(grey, cmap="gray", vmin=-0.25, vmax=1)  # lifted blacks: a map shows over the shadows too
        low, high = _bulk(values)
        panel.imshow(values.numpy(), cmap="inferno", alpha=0.6, norm=LogNorm(low, high, clip=True))
        panel.set_title(f"latent {latent}: {low:.2f} to {high:.2f}", fontsize="medium")
        panel.set_axis_off()
    figure.supxlabel("\n".join(lines), fontsize="medium")
    FigureCanvasAgg(figure).print_png(path)


def _bulk(values: Tensor) -> tuple[float, float]:
    """The 1st and 99th percentile; never equal, so that a flat map can be drawn too."""
    ordered = values.flatten().sort().values
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.01, 0.99))
    return low, max(high, low * 1.001)
