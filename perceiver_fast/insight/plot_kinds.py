"""How attention maps are drawn over each kind of input: an image, a video, a sound, points. Needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

COLOURS = "inferno"
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

    @property
    def picture(self) -> np.ndarray | None:
        """What is seen of the data, ``[.., F]`` in [0, 1]: scaled to it as a whole, unless it is there."""
        if self.data is None or not self.data.shape[-1]:
            return None
        data = as_array(self.data)
        return data if data.min() >= 0 and data.max() <= 1 else scaled(data)

    def grid(self, count: int) -> tuple[int, int]:
        """Rows and columns of that many panels."""
        rows = ceil(count / self.columns)
        return rows, ceil(count / rows)

    def colours(self, latent: int) -> dict:
        """Arguments of all that colours by attention."""
        return {"cmap": COLOURS, "norm": self.norms[latent]}


class ImageKind(Kind):
    """The image, and maps over its grey."""

    @property
    def size(self) -> tuple[float, float]:
        rows, columns = self._grid()
        aspect = min(max(self.maps.shape[1] / self.maps.shape[2], 0.4), 2.5)  # titles need some width
        width = (AREA / aspect) ** 0.5
        return columns * (width + 0.3), rows * (width * aspect + 0.3)

    def _grid(self) -> tuple[int, int]:
        return self.grid(len(self.names) + (self.picture is not None))

    def draw(self, figure) -> list[tuple]:
        panels = list(figure.subplots(*self._grid(), squeeze=False).flat)
        for panel in panels:
            panel.set_axis_off()
        picture = self.picture
        if picture is not None:
            show_image(panels[0], picture)
            panels.pop(0).set_title(" x ".join(map(str, self.maps.shape[1:])) + " tokens", fontsize="medium")
        drawn = []
        for latent, (panel, values) in enumerate(zip(panels, self.maps)):
            panel.set_title(self.names[latent], fontsize="medium")
            drawn.append((show_map(panel, values, picture, **self.colours(latent)), [panel]))
        return drawn


class VideoKind(Kind):
    """A row of frames, and below it a row a latent."""

    @property
    def size(self) -> tuple[float, float]:
        frames, height, width = self.maps.shape[1:]
        aspect = min(max(height / width, 0.4), 2.5)
        return 1.3 * min(frames, self.frames) + 1.2, 1.3 * aspect * self._rows + 0.3

    @property
    def _rows(self) -> int:
        return len(self.names) + (self.picture is not None)

    def draw(self, figure) -> list[tuple]:
        count = self.maps.shape[1]
        chosen = torch.linspace(0, count - 1, min(count, self.frames)).round().int().tolist()
        panels = figure.subplots(self._rows, len(chosen), squeeze=False)
        for panel in panels.flat:
            panel.set(xticks=[], yticks=[])
        for panel, frame in zip(panels[0], chosen):
            panel.set_title(f"frame {frame}", fontsize="small")
        picture = self.picture
        if picture is not None:
            for panel, frame in zip(panels[0], chosen):
                show_image(panel, picture[frame])
            panels = panels[1:]
        drawn = []
        for latent, (row, values) in enumerate(zip(panels, self.maps)):
            row[0].set_ylabel(self.names[latent])
            for panel, frame in zip(row, chosen):
                under = None if picture is None else picture[frame]
                mapped = show_map(panel, values[frame], under, **self.colours(latent))
            drawn.append((mapped, list(row)))
        return drawn


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
        rows, columns = self._grid()
        return 2.8 * columns, 2.8 * rows

    def _grid(self) -> tuple[int, int]:
        return self.grid(len(self.names))

    def draw(self, figure) -> list[tuple]:
        axes = [as_array(axis) for axis in self.coords.T]
        drawn = []
        for latent, values in enumerate(self.maps):
            solid = len(axes) == 3
            panel = figure.add_subplot(*self._grid(), latent + 1, projection="3d" if solid else None)
            shading = {"depthshade": False} if solid else {}  # colours say attention alone
            where = axes if len(axes) > 1 else [*axes, self._heights()]
            mapped = panel.scatter(*where, c=as_array(values), s=9, **shading, **self.colours(latent))
            panel.set_title(self.names[latent], fontsize="medium")
            panel.set(xticks=[], yticks=[])
            if solid:
                panel.set(zticks=[], box_aspect=(1, 1, 1))
            elif len(axes) == 2:
                panel.set_aspect("equal")
            drawn.append((mapped, [panel]))
        return drawn

    def _heights(self) -> np.ndarray:
        """What points on a line are drawn at: their first channel, if they have one."""
        has_channels = self.data is not None and self.data.shape[-1] > 0
        return as_array(self.data[:, 0] if has_channels else torch.zeros(len(self.coords)))


def as_array(tensor: Tensor) -> np.ndarray:
    """What matplotlib takes."""
    return tensor.detach().cpu().float().numpy()


def scaled(array: np.ndarray) -> np.ndarray:
    """Scaled to [0, 1]; what is flat becomes 0."""
    low, high = array.min(), array.max()
    return (array - low) / (high - low if high > low else 1.0)


def show_image(panel, image: np.ndarray) -> None:
    """``image [H, W, F]`` in its colours, or the grey of other numbers of channels."""
    panel.imshow(image if image.shape[-1] == 3 else image.mean(-1), cmap="gray", vmin=0, vmax=1)


def show_map(panel, values: Tensor, image: np.ndarray | None, **colours):
    """``values [H, W]`` in colours, over the grey of the image if there is one."""
    if image is not None:  # lifted blacks: a map shows over the shadows too
        panel.imshow(image.mean(-1), cmap="gray", vmin=-0.25, vmax=1)
    return panel.imshow(as_array(values), alpha=1.0 if image is None else ALPHA, **colours)
