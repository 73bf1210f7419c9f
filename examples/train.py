"""Training with checkpoints: handwritten digits, and perceiver-pytorch's model beside this package's.

Both begin with the same weights and see the same batches. Every few steps all that training depends on is written to a
checkpoint; after an interruption --resume goes on from there, and every loss is the same to the last bit as without
it. Draws both loss curves. examples/classify.py takes the checkpoint from here.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import perceiver_pytorch
import torch
from common import Learner, accuracy, console, new_figure, parse, positive, save, show_progress, summarize
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor

import perceiver_fast as pf

MODEL = dict(
    num_freq_bands=4, max_freq=8.0, depth=2, input_channels=1, input_axis=2, num_latents=16, latent_dim=48,
    cross_dim_head=32, latent_heads=4, latent_dim_head=12, num_classes=10,
)  # fmt: skip
BATCH, RATE, HELD_OUT = 64, 3e-3, 400
OURS, THEIRS = "perceiver-fast", "perceiver-pytorch"


def load(seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[1797, 8, 8, 1]`` with values in [-1, 1], and digits; in random order, the held-out ones first."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(digits.images).float().unsqueeze(-1) / 8 - 1
    return images[order], torch.from_numpy(digits.target)[order]


class ResumableLearner(Learner):
    """A learner whose state can be saved and restored."""

    def state(self) -> dict:
        """All that the next step depends on, and the losses so far."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        return parts | {"losses": self.losses}

    def restore(self, state: dict) -> None:
        """Go on from what :meth:`state` returned."""
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.losses = list(state["losses"])


class Training:
    """Both models on the same batches.

    Args:
        steps: how many there will be.
        compare: for how many of them perceiver-pytorch's model learns alongside.
        seed: of the data, the weights and the batches.
    """

    def __init__(self, steps: int, compare: int, seed: int):
        self.settings = {"steps": steps, "compare": compare, "seed": seed, "batch": BATCH, "rate": RATE, "model": MODEL}
        images, labels = load(seed)
        self.images, self.labels = images[HELD_OUT:], labels[HELD_OUT:]
        self.held_out = images[:HELD_OUT], labels[:HELD_OUT]
        torch.manual_seed(seed)
        theirs, ours = perceiver_pytorch.Perceiver(**MODEL), pf.Perceiver(**MODEL)
        ours.load_state_dict(theirs.state_dict())
        models = {OURS: ours} | ({THEIRS: theirs} if compare else {})
        self.learners = {name: ResumableLearner(model, steps, RATE) for name, model in models.items()}
        self.step = 0
        self.saved: int | None = None  # the step that the checkpoint is of

    def advance(self) -> None:
        """One step of every model that still learns."""
        chosen = torch.randint(len(self.images), (BATCH,))
        for name, learner in self.learners.items():
            if name == OURS or self.step < self.settings["compare"]:
                learner.step((self.images[chosen],), self.labels[chosen])
        self.step += 1

    def write(self, path: Path) -> None:
        """Write a checkpoint; whenever this is interrupted, ``path`` is the old one or the new one, and whole."""
        learners = {name: learner.state() for name, learner in self.learners.items()}
        state = {"settings": self.settings, "step": self.step, "rng": torch.get_rng_state(), "learners": learners}
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        self.saved = self.step

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint; raises ValueError if that is of other settings."""
        state = read(path)
        if state["settings"] != self.settings:
            other = [f"{k}={v}" for k, v in state["settings"].items() if self.settings[k] != v]
            raise ValueError(f"{path} was written with {', '.join(other)}; give the same, or leave --resume out")
        for name, learner in self.learners.items():
            learner.restore(state["learners"][name])
        self.step = self.saved = state["step"]
        torch.set_rng_state(state["rng"])


def read(path: Path) -> dict:
    """A checkpoint; raises ValueError if the file is none."""
    try:
        state = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # bytes that are no checkpoint raise all sorts of errors
        raise ValueError(f"{path} is no checkpoint, or damaged ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"settings", "step", "rng", "learners"} <= state.keys():
        raise ValueError(f"{path} is a checkpoint of something else")
    return state


def load_model(path: Path) -> tuple[dict, int]:
    """The trained model's state_dict and the seed of its data, from a checkpoint."""
    state = read(path)
    if state["settings"]["model"] != MODEL:
        raise ValueError(f"{path} holds another model: {state['settings']['model']}")
    return state["learners"][OURS]["model"], state["settings"]["seed"]


def print_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Losses side by side: the first five steps, and some of the later ones."""
    table = Table(title="The same weights and batches: losses", show_edge=False)
    for header in ("step", THEIRS, OURS, "difference"):
        table.add_column(header, justify="right")
    count = len(theirs)
    for step in sorted({*range(min(5, count)), *range(0, count, max(1, count // 8)), count - 1}):
        table.add_row(str(step), f"{theirs[step]:.6f}", f"{ours[step]:.6f}", f"{ours[step] - theirs[step]:+.0e}")
    console.print(table)


def picture(losses: dict[str, list[float]]):
    """Loss curves, and below them how far they are apart."""
    figure = new_figure(9, 5)
    curves, difference = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for (name, values), style in zip(losses.items(), ({"linewidth": 2.5, "alpha": 0.6}, {"linewidth": 0.8})):
        curves.plot(values, label=name, **style)
    curves.set(ylabel="loss", yscale="log", title="The same weights and batches")
    curves.legend()
    if THEIRS in losses:
        difference.plot([abs(a - b) for a, b in zip(losses[OURS], losses[THEIRS])], color="black", linewidth=0.8)
        difference.set(yscale="log")
    difference.set(ylabel="|difference|", xlabel="step")
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of training beside those of every example."""
    add = parser.add_argument
    add("--steps", type=positive, metavar="N", help="training steps (default: 600; with --quick 120)")
    add("--compare", type=int, metavar="K", help="steps that perceiver-pytorch learns, too (default: all; 0: none)")
    add("--checkpoint", type=Path, metavar="PATH", help="where it is written (default: OUT/train.pt)")
    add("--every", type=positive, default=100, metavar="N", help="steps between checkpoints (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--stop-at", type=positive, metavar="N", help="stop after this step, as an interruption would")


def run(training: Training, path: Path, every: int, stop: int) -> None:
    """Train to the end or to step ``stop``, with a checkpoint every few steps and at the end."""
    steps = training.settings["steps"]
    with show_progress() as progress:
        task = progress.add_task("", total=steps, completed=training.step, loss="")
        while training.step < min(steps, stop):
            training.advance()
            if training.step % every == 0 or training.step == steps:
                training.write(path)
            loss = ", ".join(f"{learner.losses[-1]:.3f} {name}" for name, learner in training.learners.items())
            progress.update(task, completed=training.step, loss=loss)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    args = parse(__doc__, argv, add_options)
    steps = args.steps or (120 if args.quick else 600)
    path = args.checkpoint or args.out / "train.pt"
    training = Training(steps, min(steps, steps if args.compare is None else max(0, args.compare)), args.seed)
    if args.resume:
        try:
            training.resume(path)
        except (OSError, ValueError) as error:
            print(f"cannot resume: {error}", file=sys.stderr)
            return 2
        console.print(f"resumed after step {training.step} of {steps}")
    done, start = training.step, time.perf_counter()
    with pf.use_linear("torch"):  # the default measures which library is fastest, and may choose another the next time
        try:
            run(training, path, args.every, args.stop_at or steps)
        except KeyboardInterrupt:
            console.print("interrupted")
    if training.step < steps:
        saved = f"--resume goes on from the checkpoint, of step {training.saved}"
        console.print(
            f"stopped after step {training.step}; {saved if training.saved else 'no checkpoint was written yet'}"
        )
        return 0 if training.step == args.stop_at else 1
    ours, theirs = training.learners[OURS], training.learners.get(THEIRS)
    if done < steps:
        summarize(ours.losses[done:], BATCH, time.perf_counter() - start)
    if theirs is not None:
        print_losses(ours.losses, theirs.losses)
    images, labels = training.held_out
    for name, learner in training.learners.items():
        with torch.no_grad():
            predicted = learner.model.eval()(images).argmax(-1)
        what = "" if len(learner.losses) == steps else f" after {len(learner.losses)} steps"
        accuracy(predicted, labels, 10, f"{name}{what}: held-out accuracy")
    console.print(f"checkpoint: {path}", soft_wrap=True, markup=False)
    save(picture({name: learner.losses for name, learner in training.learners.items()}), args.out / "train.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
