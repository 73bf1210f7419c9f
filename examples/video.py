"""Video: in which direction does the digit move? 8 frames of 16 x 16, 2,048 tokens on three axes.

No frame by itself has the answer. Draws a clip and, frame by frame, where the latents of the most contrast look.
"""

from __future__ import annotations

import torch
from common import console, parse, predict, report, save, train
from sklearn.datasets import load_digits
from torch import Tensor

import perceiver_fast as pf

FRAMES, SIDE = 8, 16
CONTRAST = 3.0  # one channel beside 27 of position: tokens should differ by what is seen, not only by where
MODEL = dict(
    num_freq_bands=4, max_freq=8.0, depth=2, input_channels=1, input_axis=3, num_latents=24, latent_dim=48,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12,
)  # fmt: skip
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def digits() -> Tensor:
    """Handwritten digits ``[1797, 8, 8]`` with values in [0, 1]."""
    return torch.from_numpy(load_digits().images).float() / 16


def clips(images: Tensor, labels: Tensor) -> Tensor:
    """A random digit moving one pixel a frame, ``[B, 8, 16, 16, 1]``, in directions ``[B]``."""
    batch = len(labels)
    shown = images[torch.randint(len(images), (batch,))]
    step = torch.tensor(list(DIRECTIONS.values()))[labels]  # [B, 2]
    # A digit stays in the picture: it moves over seven of the eight pixels there are along its way.
    start = torch.randint(9, (batch, 2)).where(step == 0, (torch.rand(batch, 2) < 0.5) + 7 * (step < 0))
    corner = start.unsqueeze(1) + torch.arange(FRAMES).view(1, -1, 1) * step.unsqueeze(1)  # [B, T, 2]
    along = corner.unsqueeze(-1) + torch.arange(8)  # [B, T, 2, 8]
    rows, columns = along[:, :, 0, :, None], along[:, :, 1, None, :]
    video = torch.zeros(batch, FRAMES, SIDE, SIDE)
    video[torch.arange(batch).view(-1, 1, 1, 1), torch.arange(FRAMES).view(1, -1, 1, 1), rows, columns] = shown[:, None]
    return (2 * video - 1).unsqueeze(-1)


def picture(model: pf.Perceiver, of: Tensor, title: str):
    """The first of some clips ``[B, T, H, W, 1]``, and below it where the latents of the most contrast look."""
    latents = pf.contrasting_latents(model, of, layer=1, count=3)
    maps = pf.attention_map(model, of[:1], layer=1, latents=latents, heads="mean")
    return pf.plot_attention_map(maps[0], of[0], latents=latents, scale="log", title=title)


def main() -> None:
    args = parse(__doc__)
    images, names = digits(), list(DIRECTIONS)
    images, unseen = images[:1400], images[1400:]

    def draw(batch: int, of: Tensor = images) -> tuple[tuple, Tensor]:
        labels = torch.randint(len(names), (batch,))
        return (CONTRAST * clips(of, labels),), labels

    model = pf.Perceiver(**MODEL, num_classes=len(names))
    console.print(str(pf.explain(model, draw(1)[0][0])), markup=False)
    train(model, draw, steps=150 if args.quick else 500, batch=16)
    predicted, true = predict(model, lambda count: draw(count, unseen), 200 if args.quick else 600, batch=32)
    report(predicted, true, names, "clips of digits not seen before")
    (of,), labels = draw(64, unseen)
    save(picture(model, of, f"a digit moving {names[labels[0]]}"), args.out / "attention-video.png")


if __name__ == "__main__":
    main()
