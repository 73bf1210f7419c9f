"""Classifying with a checkpoint: handwritten digits, how sure the model is, and where its latents look.

Takes the checkpoint of examples/train.py (or trains quickly first), classifies the digits held out of training, and
loads the same checkpoint into perceiver-pytorch's model, which has to say the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import perceiver_pytorch
import torch
from common import console, new_figure, parse, positive, report, save, train
from rich.table import Table
from torch import Tensor
from train import BATCH, HELD_OUT, MODEL, load, load_model

import perceiver_fast as pf

AGREE = 1e-4  # of a probability: rounding in float32 stays far below
LAYER = 1  # of the last block


def train_quickly(seed: int, steps: int) -> dict:
    """The state_dict of a model trained for a few steps."""
    images, labels = (part[HELD_OUT:] for part in load(seed))

    def draw(batch: int):
        chosen = torch.randint(len(images), (batch,))
        return (images[chosen],), labels[chosen]

    model = pf.Perceiver(**MODEL)
    train(model, draw, steps, BATCH)
    return model.state_dict()


def pick(probabilities: Tensor, labels: Tensor, count: int) -> list[int]:
    """Indices of the first ``count`` digits; the last of them is a digit that the model got wrong, if there is one."""
    wrong = (probabilities.argmax(1) != labels).nonzero().flatten().tolist()
    chosen = list(range(min(count, len(labels))))
    return chosen if not wrong or wrong[0] in chosen else [*chosen[:-1], wrong[0]]


def say(probabilities: Tensor, label: Tensor) -> str:
    """The model's answer for one digit, in words."""
    best = int(probabilities.argmax())
    return f"{'a' if best != 8 else 'an'} {best}: {probabilities[best]:.0%}" + (
        "" if best == label else f", is {label}"
    )


def print_table(probabilities: Tensor, labels: Tensor, chosen: list[int]) -> None:
    """Probabilities of all ten digits, for the chosen ones."""
    table = Table(title="Probabilities in percent: rows are held-out digits", show_edge=False)
    table.add_column("truth", justify="right")
    for digit in range(10):
        table.add_column(str(digit), justify="right")
    for index in chosen:
        best = int(probabilities[index].argmax())
        colour = "green" if best == labels[index] else "red"
        cells = [f"{100 * p:.1f}" if p >= 5e-4 else "" for p in probabilities[index].tolist()]
        cells[best] = f"[bold {colour}]{cells[best]}"
        table.add_row(str(int(labels[index])), *cells)
    console.print(table)


def picture(model: pf.Perceiver, images: Tensor, answers: list[str], count: int = 5):
    """A digit a row, and where the latents of the most contrast look at it in the last block."""
    latents = pf.contrasting_latents(model, images, LAYER, count)
    maps = pf.attention_map(model, images, LAYER, latents, heads="mean")
    figure = new_figure(10, 1.8 * len(images))
    rows = figure.subfigures(len(images), 1, squeeze=False)[:, 0]
    for row, image, of_image, answer in zip(rows, images, maps, answers):
        pf.plot_attention_map(of_image, image, latents=latents, columns=1 + count, title=answer, figure=row)
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options beside those of every example."""
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="of train.py (default: OUT/train.pt)")
    parser.add_argument("--digits", type=positive, default=6, metavar="N", help="shown (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Classify; returns the exit code."""
    args = parse(__doc__, argv, add_options)
    path, seed = args.checkpoint or args.out / "train.pt", args.seed
    if args.checkpoint is None and not path.exists():
        console.print(f"no checkpoint at {path} (examples/train.py writes it): training quickly first", markup=False)
        weights = train_quickly(seed, 80 if args.quick else 300)
    else:
        try:
            weights, seed = load_model(path)
        except (OSError, ValueError) as error:
            print(f"cannot load the checkpoint: {error}", file=sys.stderr)
            return 2
        console.print(f"checkpoint: {path}", markup=False, soft_wrap=True)

    images, labels = (part[:HELD_OUT] for part in load(seed))
    models = pf.Perceiver(**MODEL), perceiver_pytorch.Perceiver(**MODEL)
    with torch.no_grad():
        for model in models:
            model.eval().load_state_dict(weights)
        ours, theirs = (model(images).softmax(1) for model in models)
    chosen = pick(ours, labels, args.digits)
    print_table(ours, labels, chosen)
    report(ours.argmax(1), labels, [str(digit) for digit in range(10)], "held-out digits")
    difference = float((ours - theirs).abs().max())
    console.print(f"perceiver-pytorch with this checkpoint: its probabilities differ by at most {difference:.0e}")
    answers = [say(ours[index], labels[index]) for index in chosen]
    save(picture(models[0], images[chosen], answers), args.out / "attention-image.png")
    return 0 if difference < AGREE else 1


if __name__ == "__main__":
    sys.exit(main())
