"""An image autoencoder: crops of photographs in, latents of half as many numbers, and the crop again, on a grid of any size.

Tokens are described by what they are: pixels on a grid, with Fourier codes of their positions. So are queries, which have
nothing but a position, put through a linear layer. Trained on the upper part of scikit-learn's two photographs; draws
tiles of the lower part, which it has not seen, what comes out, and the same latents decoded on a grid of twice the size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import console, new_figure, parse, positive, save, train
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import perceiver_fast as pf

CROP = 16  # pixels along an axis of a crop
WIDTH = 48
BANDS = 5
CODES = dict(num_freq_bands=BANDS, max_freq=CROP / 2)  # waves of at least 4 pixels, for grids between pixels, too
MODEL = dict(
    depth=2, dim=3 + 2 * (2 * BANDS + 1), queries_dim=WIDTH, logits_dim=3, num_latents=8, latent_dim=WIDTH, cross_heads=2,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12, decoder_ff=True,
)  # fmt: skip


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """Two images ``[height, width, 3]`` of half their size, in [-1, 1]: the upper part, and the lower one."""
    upper, lower = [], []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).float().permute(2, 0, 1) / 127.5 - 1
        pixels = F.avg_pool2d(pixels, 2).permute(1, 2, 0)
        rows = len(pixels) * 2 // 3
        upper.append(pixels[:rows])
        lower.append(pixels[rows:])
    return upper, lower


class Crops:
    """Random crops of images, ``[B, CROP, CROP, 3]``; and the same as what the output is to be, ``[B, CROP^2, 3]``."""

    def __init__(self, images: Sequence[Tensor]):
        self.images = images

    def __call__(self, batch: int) -> tuple[tuple, Tensor]:
        crops = []
        for index in torch.randint(len(self.images), (batch,)).tolist():
            image = self.images[index]
            row, column = (int(torch.randint(size - CROP + 1, ())) for size in image.shape[:2])
            crops.append(image[row : row + CROP, column : column + CROP])
        crops = torch.stack(crops)
        return (crops,), crops.flatten(1, 2)


def tiles(image: Tensor, rows: int, columns: int) -> Tensor:
    """The first tiles of an image, ``[rows x columns, CROP, CROP, 3]``."""
    part = image[: rows * CROP, : columns * CROP]
    return part.view(rows, CROP, columns, CROP, 3).transpose(1, 2).reshape(-1, CROP, CROP, 3)


def joined(tiles: Tensor, rows: int) -> Tensor:
    """The image of tiles ``[rows x columns, n, n, 3]``, in [0, 1]."""
    image = tiles.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return (image.clamp(-1, 1) + 1) / 2


class Autoencoder(nn.Module):
    """Crops to latents and back, in the crop's size or another."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2 * (2 * BANDS + 1), WIDTH)
        self.model = pf.PerceiverIO(**MODEL)

    def described(self, crops: Tensor) -> pf.tokens.Description:
        """Crops ``[B, n, n, 3]`` as data."""
        return pf.grid_tokens(crops.shape[1:3], feat=crops, **CODES)

    def grid(self, size: int = CROP) -> pf.tokens.Description:
        """The positions of ``size`` x ``size`` pixels as queries."""
        extent = (1 + 1 / (CROP - 1)) * (1 - 1 / size)  # centres of the outermost pixels: 1 for a crop's own
        return pf.grid_tokens((size, size), extent=extent, embed=self.embed, **CODES)

    def forward(self, crops: Tensor, size: int = CROP) -> Tensor:
        """``[B, size^2, 3]``."""
        return self.model(self.described(crops), queries=self.grid(size))


def decibels(out: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio of values in [-1, 1]."""
    return (10 * torch.log10(4 / (out - truth).square().mean())).item()


def picture(shown: dict[str, Tensor]):
    """Images one below the other."""
    figure = new_figure(6.4, 1.45 * len(shown))
    for panel, (title, image) in zip(figure.subplots(len(shown), 1), shown.items()):
        panel.imshow(image)
        panel.set(xticks=[], yticks=[])
        panel.set_title(title, fontsize=9)
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every example."""
    parser.add_argument("--steps", type=positive, metavar="N", help="training steps (default: 2000; with --quick 60)")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and draw; returns 0."""
    args = parse(__doc__, argv, add_options)
    upper, lower = photographs()
    model, draw = Autoencoder(), Crops(upper)
    (crops,), _ = draw(1)
    console.print(str(pf.explain(model.model, model.described(crops), queries=model.grid())), markup=False)
    train(model, draw, args.steps or (60 if args.quick else 2000), batch=16, rate=3e-3, loss=F.mse_loss)
    model.eval()
    rows, columns = 3, 16
    shown, errors = {}, []
    with torch.no_grad():
        for name, image in zip(("temple", "flower"), lower):
            truth = tiles(image, rows, columns)
            out, large = (model(truth, size).view(-1, size, size, 3) for size in (CROP, 2 * CROP))
            mean = truth.mean((1, 2), keepdim=True).expand_as(truth)
            errors.append((decibels(out, truth), decibels(mean, truth)))
            shown |= {
                f"{name}: not seen in training": joined(truth, rows),
                f"{name}: from {MODEL['num_latents']} latents a tile": joined(out, rows),
                f"{name}: the same latents, four times the pixels": joined(large, rows),
            }
    ours, flat = (sum(values) / len(errors) for values in zip(*errors))
    console.print(f"accuracy: {ours:.1f} dB on tiles that were not seen (their mean colour: {flat:.1f} dB)")
    save(picture(shown), args.out / "image.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
