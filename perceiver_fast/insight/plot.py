"""Pictures of attention maps: over images, frames of a video, along a sound, on points."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from perceiver_fast.installation import install

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure, SubFigure

    Given = TypeVar("Given", Figure, SubFigure)

WHO = "plot_attention_map"
SCALES = ("linear", "log")
ALPHA = 0.65  # of a map over a picture
AREA = 5.0  # square inches of a panel


@overload
def plot_attention_map(
    maps: Tensor | Mapping[str, Tensor],
    data: Tensor | Mapping[str, Any] | None = None,
    coords: Tensor | None = None,
    *,
    latents: Sequence[int] | None = None,
    scale: str = "linear",
    shared: bool = True,
    frames: int = 8,
    columns: int = 4,
    title: str = "",
    caption: str = "",
    figure: None = None,
) -> Figure: ...


@overload
def plot_attention_map(
    maps: Tensor | Mapping[str, Tensor],
    data: Tensor | Mapping[str, Any] | None = None,
    coords: Tensor | None = None,
    *,
    latents: Sequence[int] | None = None,
    scale: str = "linear",
    shared: bool = True,
    frames: int = 8,
    columns: int = 4,
    title: str = "",
    caption: str = "",
    figure: Given,
) -> Given: ...


def plot_attention_map(
    maps: Tensor | Mapping[str, Tensor],
    data: Tensor | Mapping[str, Any] | None = None,
    coords: Tensor | None = None,
    *,
    latents: Sequence[int] | None = None,
    scale: str = "linear",
    shared: bool = True,
    frames: int = 8,
    columns: int = 4,
    title: str = "",
    caption: str = "",
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draw where chosen latents look, one panel a latent, over what they look at.

    Colours are attention relative to uniform attention, 1 on average. Maps of two axes are drawn over an image, of
    three over frames of a video, of one along a sound, and with coords on points.

    Args:
        maps: of one example, ``[n, n_1, .., n_A]`` for n latents, as ``attention_map(.., heads="mean")[0]``; or a dict
            of them by modality, which are drawn below one another.
        data: what is looked at, ``[n_1, .., n_A, F]``; of a dict of maps a dict, with a pair ``(data, coords)`` for
            points. Images with values outside of [0, 1] are scaled to it. Default: maps alone.
        coords: positions ``[M, A]`` of maps ``[n, M]``, A at most 3. Default: maps are on a grid.
        latents: the latents' numbers, for their titles. Default: 0 .. n-1.
        scale: of colours; ``"linear"`` from zero to the 99th percentile, ``"log"`` from the 1st, or a
            10,000th of the 99th, to that.
        shared: one scale for all latents, or one for each. Default: True.
        frames: of a video, how many are drawn at most, evenly spaced. Default: 8.
        columns: panels of images and points beside each other at most. Default: 4.
        title, caption: above and below.
        figure: draw in this one. Default: a new one of a size that fits.

    Returns:
        The figure. ``figure.savefig(path)`` writes it; no display is needed.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: maps, data, coords, latents or scale do not fit; the message says expected and got.

    Example:
        >>> import torch, perceiver_fast as pf
        >>> model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
        >>> image = torch.rand(1, 6, 5, 3)
        >>> maps = pf.attention_map(model, image, latents=[0, 2], heads="mean")
        >>> pf.plot_attention_map(maps[0], image[0], latents=[0, 2]).savefig("maps.png")  # doctest: +SKIP
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{WHO} needs matplotlib: {install('demo')} ({error})") from error

    if scale not in SCALES:
        raise ValueError(f"{WHO}: expected scale to be one of {', '.join(map(repr, SCALES))}, got {scale!r}")
    if frames < 1 or columns < 1:
        raise ValueError(f"{WHO}: expected at least one of the frames and columns, got {frames} and {columns}")
    parts = _parts(maps, data, coords)
    counts = {len(values) for values, *_ in parts.values()}
    latents = list(range(max(counts))) if latents is None else [int(latent) for latent in latents]
    if counts != {len(latents)} or not latents:
        raise ValueError(f"{WHO}: expected maps of the latents {latents}, got maps of {sorted(counts)} latents")

    joined = torch.cat([values.detach().flatten(1) for values, *_ in parts.values()], 1)
    uniform = joined.shape[1]  # what a weight is divided by one of, to be relative to uniform attention
    norms = [_norm(joined * uniform, scale)] * len(latents) if shared else [_norm(v * uniform, scale) for v in joined]
    names = [f"latent {latent}" for latent in latents]
    kinds: list[Kind] = []
    for values, given, where in parts.values():
        new: type[Kind] = PointsKind if where is not None else (SoundKind, ImageKind, VideoKind)[values.dim() - 2]
        kinds.append(new(values * uniform, given, where, names, norms, frames, columns))

    width, heights = max(kind.size[0] for kind in kinds), [kind.size[1] for kind in kinds]
    lines = textwrap.wrap(caption, int(13 * width))  # about 13 characters an inch
    if figure is None:
        height = sum(heights) + 0.2 * len(lines) + 0.4 * bool(title)
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    alone = len(kinds) == 1
    rooms: Any = [figure] if alone else figure.subfigures(len(kinds), 1, height_ratios=heights)
    for room, kind, (name, (values, *_)) in zip(rooms, kinds, parts.items()):
        drawn = kind.draw(room)
        for mappable, axes in [(drawn[0][0], room.axes)] if shared else drawn:
            _add_bar(room, mappable, axes, scale, "attention / uniform" if shared else "")
        if not alone:
            share = float(values.sum() / joined.sum())
            room.suptitle(f"{name}: {share:.0%} of the attention of these latents", fontsize="medium")
    if title:
        figure.suptitle(title)
    if lines:
        figure.supxlabel("\n".join(lines), fontsize="medium")
    return figure


def _parts(maps, data, coords: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None, Tensor | None]]:
    """Maps, data and coords by modality, checked; of a single one under no name."""
    if not isinstance(maps, Mapping):
        return {"": _checked("", maps, data, coords)}
    if not maps or coords is not None or not (data is None or isinstance(data, Mapping)):
        raise ValueError(
            f"{WHO}: expected maps of at least one modality, and data as a dict of the same (points as a pair of data "
            f"and coords), got maps of {list(maps)}, data {type(data).__name__}, coords {type(coords).__name__}"
        )
    parts = {}
    for name, values in maps.items():
        given = None if data is None else data.get(name)
        pair = given if isinstance(given, (tuple, list)) else (given, None)
        parts[name] = _checked(f" of {name}", values, *pair)
    return parts


def _checked(of: str, maps, data, coords) -> tuple[Tensor, Tensor | None, Tensor | None]:
    for what, value in (("maps", maps), ("data", data), ("coords", coords)):
        if not isinstance(value, Tensor) and (value is not None or what == "maps"):
            raise TypeError(f"{WHO}: expected {what}{of} to be a torch.Tensor, got {type(value).__name__}")
    shape = tuple(maps.shape)
    if not 2 <= len(shape) <= 4 or 0 in shape[1:]:
        raise ValueError(
            f"{WHO}: expected maps{of} [latents, n_1, .., n_A] of one example, 1 to 3 axes, got {shape}; "
            "choose an example and a head, e.g. attention_map(.., heads='mean')[0]"
        )
    if data is not None and tuple(data.shape[:-1]) != shape[1:]:
        raise ValueError(
            f"{WHO}: expected data{of} of shape {(*shape[1:], 'channels')}, as the maps, got {tuple(data.shape)}; "
            "choose the same example, e.g. data[0]"
        )
    if coords is not None and (len(shape) != 2 or coords.shape[:-1] != shape[1:] or not 1 <= coords.shape[-1] <= 3):
        raise ValueError(
            f"{WHO}: expected coords{of} [points, 1 to 3] of maps [latents, points], got {tuple(coords.shape)} of maps "
            f"{shape}"
        )
    return maps, data, coords


def _norm(values: Tensor, scale: str):
    """A colour scale over the bulk of ``values``; never empty, so that a flat map can be drawn too."""
    from matplotlib.colors import LogNorm, Normalize

    ordered = values.flatten().float().sort().values
    if scale == "log":
        ordered = ordered[ordered > 0] if (ordered > 0).any() else ordered.new_ones(1)  # masked tokens have none
    low, high = (float(ordered[round(share * (len(ordered) - 1))]) for share in (0.01, 0.99))
    if scale == "log":  # what is smaller than that plays no part in the result
        return LogNorm(max(low, high / 10_000), max(high, low * 1.001), clip=True)
    return Normalize(0.0, high if high > 0 else 1.0, clip=True)


def _add_bar(figure, mappable, axes: list, scale: str, label: str) -> None:
    bar = figure.colorbar(mappable, ax=axes, aspect=30, extend="both" if scale == "log" else "max")
    bar.set_label(label, fontsize="small")
    if scale == "log":  # matplotlib labels less than a decade with powers of ten
        low, high = mappable.norm.vmin, mappable.norm.vmax
        steps = [10.0**power for power in range(floor(log10(low)), ceil(log10(high)) + 1)]
        fine = [step * part for step in steps for part in (1, 2, 5) if low <= step * part <= high]
        ticks = fine if len(fine) < 9 else [step for step in steps if low <= step <= high]
        bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()
    bar.ax.tick_params(labelsize="x-small")


@dataclass
class Kind:
    """Maps over one input; every kind of input has a ``size`` in inches and a way to ``draw``.

    ``draw(figure)`` returns what was coloured, and its axes, for every latent.

    Args:
        maps: ``[n, n_1, .., n_A]``, relative to uniform attention.
        data: ``[n_1, .., n_A, F]`` or None.
        coords: ``[M, A]`` of points, else None.
        names: of the n latents.
        norms: their colour scales, of matplotlib.
        frames: of a video, how many are drawn at most.
        columns: panels beside each other at most.
    """

    maps: Tensor
    data: Tensor | None
    coords: Tensor | None
    names: list[str]
    norms: list
    frames: int
    columns: int

    @property
    def size(self) -> tuple[float, float]:
        raise NotImplementedError

    def draw(self, figure: Any) -> list[tuple]:
        raise NotImplementedError

    @cached_property
    def picture(self) -> np.ndarray | None:
        """What is seen of the data, ``[.., F]`` in [0, 1]: scaled to it as a whole, unless it is there."""
        if self.data is None or not self.data.shape[-1]:
            return None
        data = as_array(self.data)
        return data if data.min() >= 0 and data.max() <= 1 else scaled(data)

    @property
    def panels(self) -> int:
        """How many panels, or rows of them, there are: one a latent, and the picture's."""
        return len(self.names) + (self.picture is not None)

    def grid(self, count: int) -> tuple[int, int]:
        """Rows and columns of that many panels."""
        rows = ceil(count / self.columns)
        return rows, ceil(count / rows)

    def colours(self, latent: int) -> dict:
        """Arguments of all that colours by attention."""
        return {"cmap": "inferno", "norm": self.norms[latent]}

    def draw_rows(self, rows: list, maps: Tensor, pictures: np.ndarray | None) -> list[tuple]:
        """Draw in rows of panels the pictures ``[T, H, W, F]``, if there are any, and below them maps ``[n, T, H, W]``."""
        if pictures is not None:  # in its colours, or the grey of other numbers of channels
            for panel, picture in zip(rows[0], pictures):
                panel.imshow(picture if picture.shape[-1] == 3 else picture.mean(-1), cmap="gray", vmin=0, vmax=1)
            rows = rows[1:]
        drawn = []
        for latent, (row, values) in enumerate(zip(rows, maps)):
            for index, panel in enumerate(row):
                if pictures is not None:  # its grey, with lifted blacks: a map shows over the shadows too
                    panel.imshow(pictures[index].mean(-1), cmap="gray", vmin=-0.25, vmax=1)
                alpha = 1.0 if pictures is None else ALPHA
                mapped = panel.imshow(as_array(values[index]), alpha=alpha, **self.colours(latent))
            drawn.append((mapped, list(row)))
        return drawn


class ImageKind(Kind):
    """The image, and maps over its grey."""

    @property
    def size(self) -> tuple[float, float]:
        rows, columns = self.grid(self.panels)
        aspect = aspect_of(self.maps)
        width = (AREA / aspect) ** 0.5
        return columns * (width + 0.3), rows * (width * aspect + 0.3)

    def draw(self, figure: Any) -> list[tuple]:
        panels, picture = figure.subplots(*self.grid(self.panels), squeeze=False).flatten(), self.picture
        for panel in panels:
            panel.set_axis_off()
        titles = [" x ".join(map(str, self.maps.shape[1:])) + " tokens"] * (picture is not None) + self.names
        for panel, title in zip(panels, titles):
            panel.set_title(title, fontsize="medium")
        return self.draw_rows(panels[:, None], self.maps[:, None], None if picture is None else picture[None])


class VideoKind(Kind):
    """A row of frames, and below it a row a latent."""

    @property
    def size(self) -> tuple[float, float]:
        return 1.3 * min(self.maps.shape[1], self.frames) + 1.2, 1.3 * aspect_of(self.maps) * self.panels + 0.3

    def draw(self, figure: Any) -> list[tuple]:
        count, picture = self.maps.shape[1], self.picture
        chosen = torch.linspace(0, count - 1, min(count, self.frames)).round().int().tolist()
        rows = figure.subplots(self.panels, len(chosen), squeeze=False)
        for panel in rows.flat:
            panel.set(xticks=[], yticks=[])
        for panel, frame in zip(rows[0], chosen):
            panel.set_title(f"frame {frame}", fontsize="small")
        for row, name in zip(rows[self.panels - len(self.names) :], self.names):
            row[0].set_ylabel(name)
        return self.draw_rows(rows, self.maps[:, chosen], None if picture is None else picture[chosen])


class SoundKind(Kind):
    """The waveform, or the range of several channels, and below it a strip of attention; one panel a latent."""

    @property
    def size(self) -> tuple[float, float]:
        return 10.0, 1.3 * len(self.names) + 0.3

    def draw(self, figure: Any) -> list[tuple]:
        panels = figure.subplots(len(self.names), 1, sharex=True, squeeze=False)[:, 0]
        count, drawn = self.maps.shape[1], []
        wave = None if self.picture is None else scaled(self.picture)
        for latent, (panel, values) in enumerate(zip(panels, self.maps)):
            extent = (-0.5, count - 0.5, 0, 1 if wave is None else 0.4)
            mapped = panel.imshow(as_array(values)[None], aspect="auto", extent=extent, **self.colours(latent))
            if wave is not None:
                low, high = (0.5 + 0.5 * bound for bound in (wave.min(1), wave.max(1)))
                if wave.shape[1] == 1:
                    panel.plot(low, color="black", linewidth=0.6)
                else:
                    panel.fill_between(range(count), low, high, color="black", linewidth=0)
            panel.set(ylabel=self.names[latent], yticks=[], ylim=(0, 1 if wave is None else 1.05))
            drawn.append((mapped, [panel]))
        panels[-1].set_xlabel("token")
        return drawn


class PointsKind(Kind):
    """Points in one, two or three dimensions, one panel a latent."""

    @property
    def size(self) -> tuple[float, float]:
        rows, columns = self.grid(len(self.names))
        return 2.8 * columns, 2.8 * rows

    def draw(self, figure: Any) -> list[tuple]:
        coords: Any = self.coords  # points have them
        where, solid, drawn = [as_array(axis) for axis in coords.T], coords.shape[1] == 3, []
        if len(where) == 1:  # points on a line are drawn at the height of their first channel, if they have one
            data = self.data
            has_channels = data is not None and data.shape[-1] > 0
            where.append(as_array(data[:, 0] if data is not None and has_channels else torch.zeros(len(coords))))
        for latent, (name, values) in enumerate(zip(self.names, self.maps)):
            panel = figure.add_subplot(*self.grid(len(self.names)), latent + 1, projection="3d" if solid else None)
            shading = {"depthshade": False} if solid else {}  # colours say attention alone
            mapped = panel.scatter(*where, c=as_array(values), s=9, **shading, **self.colours(latent))
            panel.set_title(name, fontsize="medium")
            panel.set(xticks=[], yticks=[])
            if solid:
                panel.set(zticks=[], box_aspect=(1, 1, 1))
            elif coords.shape[1] == 2:
                panel.set_aspect("equal")
            drawn.append((mapped, [panel]))
        return drawn


def aspect_of(maps: Tensor) -> float:
    """Height over width of maps ``[.., H, W]``, within bounds, as titles need some width."""
    return min(max(maps.shape[-2] / maps.shape[-1], 0.4), 2.5)


def as_array(tensor: Tensor) -> np.ndarray:
    """What matplotlib takes."""
    return tensor.detach().cpu().float().numpy()


def scaled(array: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1]; what is flat becomes 0."""
    low, high = array.min(), array.max()
    return (array - low) / (high - low if high > low else 1.0)
