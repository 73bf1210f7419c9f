"""Images: handwritten digits, pixel by pixel; the same weights as perceiver-pytorch's, and the same losses.

Trains perceiver-pytorch's model and this package's side by side for a few steps, trains this package's on, and draws
where some of its latents look.
"""

from __future__ import annotations

import perceiver_pytorch
import torch
import torch.nn.functional as F
from common import console, new_figure, parse, predict, report, save, train
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import perceiver_fast as pf

MODEL = dict(
    num_freq_bands=4, max_freq=8.0, depth=2, input_channels=1, input_axis=2, num_latents=16, latent_dim=48,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12, num_classes=10,
)  # fmt: skip


def load() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 8, 8, 1]`` with values in [-1, 1], and digits, in random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.from_numpy(digits.images).float().unsqueeze(-1) / 8 - 1
    return images[order], torch.from_numpy(digits.target)[order]


def compare(theirs: nn.Module, ours: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Train both on the same batches, and print their losses side by side."""
    table = Table(title="The same weights and batches: loss of every step", show_edge=False)
    for header in ("step", "perceiver-pytorch", "perceiver-fast", "difference"):
        table.add_column(header, justify="right")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (theirs, ours)]
    for step, (images, labels) in enumerate(batches):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        table.add_row(str(step), *(f"{loss:.6f}" for loss in losses), f"{losses[1] - losses[0]:+.0e}")
    console.print(table)


def picture(model: nn.Module, images: Tensor, labels: Tensor, latents: int = 5):
    """Digits, and beside each where the latents whose attention varies most look, in the last block."""
    maps = pf.attention_map(model, images, layer=1, latents=range(MODEL["num_latents"]))[:, 0]  # [B, N, 8, 8]
    chosen = maps.flatten(2).var(-1).mean(0).topk(latents).indices
    figure = new_figure(1.3 * (1 + latents), 1.4 * len(images))
    panels = figure.subplots(len(images), 1 + latents)
    for row, image in enumerate(images):
        panels[row, 0].imshow(image[..., 0], cmap="gray")
        panels[row, 0].set_title(f"a {labels[row]}", fontsize="small")
        for column, latent in enumerate(chosen.tolist(), 1):
            panels[row, column].imshow(maps[row, latent], cmap="inferno")
            panels[row, column].set_title(f"latent {latent}", fontsize="small")
    for panel in panels.flat:
        panel.set_axis_off()
    return figure


def main() -> None:
    args = parse(__doc__)
    images, labels = load()
    held_out, images, held_out_labels, labels = images[:400], images[400:], labels[:400], labels[400:]

    def draw(batch: int):
        chosen = torch.randint(len(images), (batch,))
        return (images[chosen],), labels[chosen]

    theirs, model = perceiver_pytorch.Perceiver(**MODEL), pf.Perceiver(**MODEL)
    model.load_state_dict(theirs.state_dict())
    console.print(str(pf.explain(model, images[:1])), markup=False)
    compare(theirs, model, [(inputs[0], answers) for inputs, answers in (draw(64) for _ in range(5))])
    train(model, draw, steps=150 if args.quick else 600, batch=64)
    predicted, _ = predict(model, lambda count: ((held_out[:count],), held_out_labels[:count]), 400, batch=400)
    report(predicted, held_out_labels, [str(digit) for digit in range(10)], "held-out digits")
    save(picture(model, held_out[:6], held_out_labels[:6]), args.out / "image.png")


if __name__ == "__main__":
    main()
