"""Point clouds: which surface were these points drawn from? Tokens at arbitrary positions, with ``coords=``.

A point has no channels but its position: data is [B, M, 0]. Surfaces are turned, scaled and moved at random. Draws test
clouds, coloured by how much two latents attend to each point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from common import console, new_figure, parse, predict, report, save, train
from torch import Tensor

import perceiver_fast as pf

POINTS = 256
MODEL = dict(
    num_freq_bands=6, max_freq=8.0, depth=2, input_channels=0, input_axis=3, num_latents=24, latent_dim=48,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12,
)  # fmt: skip


# Surfaces: every function maps random u and v [..] in [0, 1) to points [.., 3].


def sphere(u: Tensor, v: Tensor) -> Tensor:
    z, angle = 2 * u - 1, 2 * math.pi * v
    r = (1 - z.square()).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin(), z], -1)


def cube(u: Tensor, v: Tensor) -> Tensor:
    points = torch.stack([2 * u - 1, 2 * v - 1, torch.ones_like(u) - 2 * (torch.rand_like(u) < 0.5)], -1)
    order = (torch.arange(3) + torch.randint(3, (*u.shape, 1))) % 3
    return 0.8 * points.gather(-1, order)


def torus(u: Tensor, v: Tensor) -> Tensor:
    around, tube = 2 * math.pi * u, 2 * math.pi * v
    r = 0.85 + 0.35 * tube.cos()
    return torch.stack([r * around.cos(), r * around.sin(), 0.35 * tube.sin()], -1)


def cylinder(u: Tensor, v: Tensor) -> Tensor:
    angle = 2 * math.pi * u
    return torch.stack([0.6 * angle.cos(), 0.6 * angle.sin(), 2.2 * v - 1.1], -1)


def helix(u: Tensor, v: Tensor) -> Tensor:
    angle = 4 * math.pi * u
    return torch.stack([0.8 * angle.cos(), 0.8 * angle.sin(), 2 * u - 1], -1) + 0.05 * torch.randn(*u.shape, 3)


SURFACES = {f.__name__: f for f in (sphere, cube, torus, cylinder, helix)}


def rotations(count: int) -> Tensor:
    """Random rotations ``[count, 3, 3]``."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return q * torch.linalg.det(q)[:, None, None]


def draw(batch: int) -> tuple[tuple, Tensor]:
    """``(data [B, M, 0], positions [B, M, 3])`` and which surface ``[B]``."""
    labels, u, v = torch.randint(len(SURFACES), (batch,)), torch.rand(batch, POINTS), torch.rand(batch, POINTS)
    every = torch.stack([surface(u, v) for surface in SURFACES.values()])
    points = every[labels, torch.arange(batch)] @ rotations(batch) * (0.5 + 0.3 * torch.rand(batch, 1, 1))
    points = points + 0.1 * torch.randn(batch, 1, 3) + 0.01 * torch.randn(batch, POINTS, 3)
    return (torch.empty(batch, POINTS, 0), points), labels


class Classifier(pf.Perceiver):
    """A Perceiver that takes the positions as its second argument."""

    def forward(self, data: Tensor, coords: Tensor) -> Tensor:
        return super().forward(data, coords=coords)


def picture(model: pf.Perceiver, shown: Sequence[str] = ("cube", "torus", "cylinder", "helix")):
    """Clouds of some surfaces, coloured by where the two latents of the most contrast look in the first block."""
    (data, coords), labels = draw(64)
    latents = pf.contrasting_latents(model, data, count=2, coords=coords)
    figure = new_figure(2.9 * len(shown), 5.4)
    for column, name in zip(figure.subfigures(1, len(shown)), shown):
        first = int((labels == list(SURFACES).index(name)).nonzero()[0])
        cloud = coords[first]
        maps = pf.attention_map(model, data[:1], latents=latents, heads="mean", coords=cloud)
        pf.plot_attention_map(maps[0], coords=cloud, latents=latents, scale="log", columns=1, title=name, figure=column)
    return figure


def main() -> None:
    args = parse(__doc__)
    names = list(SURFACES)
    model = Classifier(**MODEL, num_classes=len(names))
    (data, coords), _ = draw(1)
    console.print(str(pf.explain(model, data, coords=coords)), markup=False)
    train(model, draw, steps=120 if args.quick else 900, batch=32)
    predicted, true = predict(model, draw, 200 if args.quick else 1000)
    report(predicted, true, names, "new clouds")

    save(picture(model), args.out / "attention-points.png")


if __name__ == "__main__":
    main()
