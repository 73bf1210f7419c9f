"""A shape autoencoder: points on the surface of a solid in, its inside at any point out, and a field to make a mesh of.

Solids are unions of two turned boxes, balls, rings and capsules, given by formulas of their signed distance. Latents read
points of the surface, described by their positions; described queries ask the latents whether a point is inside: in
training at points, and in the end at every point of a grid, which is written to a file part by part. Draws solids that the
model has not seen, and what it makes of their points.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import console, new_figure, parse, positive, save, train
from torch import Tensor, nn

import perceiver_fast as pf

SURFACE, INSIDE = 256, 256  # points of a surface that the model reads, and points that it is asked about in training
WIDTH = 96
MODEL = dict(
    depth=2, dim=WIDTH, queries_dim=WIDTH, logits_dim=1, num_latents=32, latent_dim=WIDTH, cross_heads=2,
    cross_dim_head=48, latent_heads=4, latent_dim_head=24,
)  # fmt: skip
FREQUENCIES = 2.0 ** torch.arange(4) / 2  # half periods a unit of position


# Signed distances to solids around the origin: of points [.., 3], negative inside.


def ball(p: Tensor) -> Tensor:
    return p.norm(dim=-1) - 0.5


def box(p: Tensor) -> Tensor:
    q = p.abs() - torch.tensor([0.6, 0.4, 0.27])
    return q.clamp_min(0).norm(dim=-1) + q.amax(-1).clamp_max(0)


def ring(p: Tensor) -> Tensor:
    around = torch.stack([p[..., :2].norm(dim=-1) - 0.5, p[..., 2]], -1)
    return around.norm(dim=-1) - 0.2


def capsule(p: Tensor) -> Tensor:
    along = torch.cat([p[..., :2], p[..., 2:] - p[..., 2:].clamp(-0.5, 0.5)], -1)
    return along.norm(dim=-1) - 0.24


SOLIDS = (ball, box, ring, capsule)


class Shapes:
    """A batch of solids, unions of two.

    Args:
        count: how many, B.
    """

    def __init__(self, count: int):
        q, r = torch.linalg.qr(torch.randn(2, count, 3, 3))
        self.turned = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        self.moved = torch.rand(2, count, 1, 3) * 0.6 - 0.3
        self.kinds = torch.randint(len(SOLIDS), (2, count, 1))

    def distance(self, points: Tensor) -> Tensor:
        """Signed distance of ``points [B, M, 3]`` to every solid, ``[B, M]``; inside of both it is a bound."""
        own = (points - self.moved) @ self.turned  # [2, B, M, 3], in each part's own axes
        each = torch.stack([solid(own) for solid in SOLIDS], -1)
        return each.take_along_dim(self.kinds.unsqueeze(-1), -1).squeeze(-1).amin(0)

    def surface(self, count: int) -> Tensor:
        """Random points of the surface, ``[B, count, 3]``: of more points that were moved along the distance, the nearest."""
        points = torch.rand(len(self.moved[0]), count + count // 4, 3) * 2 - 1
        for _ in range(3):
            with torch.enable_grad():
                moving = points.detach().requires_grad_()
                distance = self.distance(moving)
                (slope,) = torch.autograd.grad(distance.sum(), moving)
            points = (moving - distance.unsqueeze(-1) * slope).detach()
        nearest = self.distance(points).abs().topk(count, 1, largest=False).indices
        return points.take_along_dim(nearest.unsqueeze(-1), 1)


def draw(batch: int) -> tuple[tuple, Tensor]:
    """``(points of surfaces, points that are asked about)`` and which of these are inside ``[B, Q, 1]``."""
    shapes = Shapes(batch)
    surface = shapes.surface(SURFACE)
    near = surface[:, : INSIDE // 2] + 0.08 * torch.randn(batch, INSIDE // 2, 3)
    asked = torch.cat([near, torch.rand(batch, INSIDE - INSIDE // 2, 3) * 2 - 1], 1)
    return (surface, asked), (shapes.distance(asked) < 0).float().unsqueeze(-1)


class Autoencoder(nn.Module):
    """Latents of surfaces, and a field: a linear layer embeds the codes of all positions, as 3DShape2VecSet's does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3 * (2 * len(FREQUENCIES) + 1), WIDTH)
        self.model = pf.PerceiverIO(**MODEL)

    def described(self, points: Tensor) -> pf.tokens.Description:
        """Points ``[B, M, 3]`` as data or as queries."""
        return pf.point_tokens(points, frequencies=FREQUENCIES, embed=self.embed, layout="vecset")

    def grid(self, size: int) -> pf.tokens.Description:
        """All points of a grid as queries."""
        return pf.grid_tokens((size,) * 3, frequencies=FREQUENCIES, embed=self.embed, layout="vecset")

    def forward(self, surface: Tensor, asked: Tensor) -> Tensor:
        """How much points ``asked [B, Q, 3]`` are inside, logits ``[B, Q, 1]``."""
        return self.model(self.described(surface), queries=self.described(asked))


def overlap(a: Tensor, b: Tensor) -> float:
    """Intersection over union of solids ``[B, ..]`` bool, averaged over the batch."""
    a, b = a.flatten(1), b.flatten(1)
    return ((a & b).sum(1) / (a | b).sum(1)).mean().item()


def positions(size: int) -> Tensor:
    """All points of the grid, ``[1, size^3, 3]``."""
    axis = torch.linspace(-1, 1, size)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(1, -1, 3)


def shell(solid: Tensor) -> Tensor:
    """The points ``[n, 3]`` of a solid ``[size, size, size]`` that have a neighbour outside."""
    inner = -F.max_pool3d(-solid[None, None].float(), 3, 1, 1)[0, 0] > 0
    return (solid & ~inner).nonzero() * 2 / (len(solid) - 1) - 1


def picture(surface: Tensor, field: Tensor, truth: Tensor):
    """A row a solid: what is read, what is decoded, the truth, and the decoded field on the middle slice."""
    count, size = len(field), field.shape[1]
    figure = new_figure(10, 2.6 * count)
    titles = (
        "read: 256 points",
        f"decoded: {size} x {size} x {size}",
        "truth",
        "logits at z = 0, and the truth's edge",
    )
    for row in range(count):
        clouds = (surface[row], shell(field[row] > 0), shell(truth[row]))
        for column, cloud in enumerate(clouds):
            panel = figure.add_subplot(count, 4, 4 * row + column + 1, projection="3d")
            x, y, z = cloud.T
            panel.scatter(x, y, z, c=z - x + y, s=3 if column else 5, cmap="viridis", depthshade=True)
            panel.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1), xticks=[], yticks=[], zticks=[])
            panel.set_box_aspect((1, 1, 1))
            if row == 0:
                panel.set_title(titles[column], fontsize=9)
        panel = figure.add_subplot(count, 4, 4 * row + 4)
        extent = (-1, 1, -1, 1)
        middle = field[row, :, :, size // 2].T
        panel.imshow(middle, origin="lower", extent=extent, cmap="RdBu", vmin=-8, vmax=8)
        for values, style in ((middle, "-"), (truth[row, :, :, size // 2].T.float() - 0.5, ":")):
            if values.min() < 0 < values.max():
                panel.contour(values, [0.0], colors="black", linestyles=style, extent=extent, linewidths=1)
        panel.set(xticks=[], yticks=[])
        if row == 0:
            panel.set_title(titles[3], fontsize=9)
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every example."""
    add = parser.add_argument
    add("--steps", type=positive, metavar="N", help="training steps (default: 1500; with --quick 60)")
    add("--size", type=positive, metavar="N", help="points along an axis of the decoded grid (default: 64; quick 16)")
    add("--field", type=Path, metavar="PATH", help="where the decoded field goes (default: OUT/shapes.npy)")


def decode(model: Autoencoder, surface: Tensor, size: int, path: Path) -> Tensor:
    """The field of every solid, written to a .npy file: ``[B, size, size, size]``, positive inside, zero on the surface."""
    field = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(surface), size, size, size, 1))
    model.model.decode_into(field, model.described(surface), model.grid(size), progress=True)
    field.flush()
    console.print(f"field: {path}, ready for marching cubes at level 0", soft_wrap=True, markup=False)
    return torch.from_numpy(np.array(field)).squeeze(-1)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, decode, measure and draw; returns 0."""
    args = parse(__doc__, argv, add_options)
    model = Autoencoder()
    (surface, asked), _ = draw(1)
    explained = pf.explain(model.model, model.described(surface), queries=model.described(asked))
    console.print(str(explained), markup=False)
    steps = args.steps or (60 if args.quick else 1500)
    train(model, draw, steps, batch=16, rate=2e-3, loss=F.binary_cross_entropy_with_logits)
    model.eval()
    torch.manual_seed(args.seed + 1)
    size, shapes = args.size or (16 if args.quick else 64), Shapes(4 if args.quick else 16)
    surface = shapes.surface(SURFACE)
    field = decode(model, surface, size, args.field or args.out / "shapes.npy")
    truth = (shapes.distance(positions(size)) < 0).view(field.shape)
    correct, guessing = (((field > 0) == truth).float().mean().item(), (~truth).float().mean().item())
    console.print(
        f"accuracy: {correct:.1%} (guessing: {guessing:.1%}); new solids overlap by {overlap(field > 0, truth):.1%}"
    )
    save(picture(surface[:4], field[:4], truth[:4]), args.out / "shapes.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
