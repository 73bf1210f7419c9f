"""How attention maps are drawn over each kind of input: an image, a video, a sound, points. Needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.65  # of a map over a picture
AREA = 5.0  # square inches of a panel


@dataclass
class Kind:
    """Maps over one input.

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
        """Width and height in inches of a picture that fits."""
        raise NotImplementedError

    def draw(self, figure) -> list[tuple]:
        """Draw; returns what was coloured, and its axes, for every latent."""
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

    def draw(self, figure) -> list[tuple]:
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

    def draw(self, figure) -> list[tuple]:
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

    def draw(self, figure) -> list[tuple]:
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

    def draw(self, figure) -> list[tuple]:
        where, solid, drawn = [as_array(axis) for axis in self.coords.T], self.coords.shape[1] == 3, []
        if len(where) == 1:  # points on a line are drawn at the height of their first channel, if they have one
            has_channels = self.data is not None and self.data.shape[-1] > 0
            where.append(as_array(self.data[:, 0] if has_channels else torch.zeros(len(self.coords))))
        for latent, (name, values) in enumerate(zip(self.names, self.maps)):
            panel = figure.add_subplot(*self.grid(len(self.names)), latent + 1, projection="3d" if solid else None)
            shading = {"depthshade": False} if solid else {}  # colours say attention alone
            mapped = panel.scatter(*where, c=as_array(values), s=9, **shading, **self.colours(latent))
            panel.set_title(name, fontsize="medium")
            panel.set(xticks=[], yticks=[])
            if solid:
                panel.set(zticks=[], box_aspect=(1, 1, 1))
            elif self.coords.shape[1] == 2:
                panel.set_aspect("equal")
            drawn.append((mapped, [panel]))
        return drawn


def kind_of(maps: Tensor, coords: Tensor | None) -> type[Kind]:
    """The kind of input that maps ``[n, n_1, .., n_A]`` are over."""
    return PointsKind if coords is not None else (SoundKind, ImageKind, VideoKind)[maps.dim() - 2]


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
