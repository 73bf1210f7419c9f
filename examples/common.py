"""What the examples share: options, a training loop with a progress bar, accuracy, and tables of confusions."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

console = Console(highlight=False)
if not console.is_terminal:
    console.width = max(console.width, 120)  # rich assumes 80 columns for a file or a pipe

# draw(batch size) -> the model's positional arguments, and labels [batch], or what else the loss compares outputs with
Draw = Callable[[int], tuple[tuple, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def parse(
    description: str | None,
    argv: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Read an example's options, set the seed and the number of threads, and make the folder for pictures.

    Args:
        description: of the example, for ``--help``.
        argv: the command line. Default: that of the process.
        add_options: adds the example's own options to those of every example.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few training steps, enough to see that it learns")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    # These models are small: on a busy machine, waiting for a second thread takes longer than it saves.
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where pictures go (default: %(default)s)"
    )
    add_options(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    return args


def positive(text: str) -> int:
    """A number of at least 1, for options."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def show_progress() -> Progress:
    """A progress bar; its tasks have a field ``loss``, text."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    return Progress(*columns, TimeRemainingColumn(), console=console)


def summarize(losses: Sequence[float], batch: int, seconds: float) -> None:
    """Print how many steps there were, and the loss at first and at last."""
    few = max(1, min(10, len(losses) // 4))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    console.print(f"{len(losses)} steps of {batch} in {seconds:.1f} s; loss {first:.3f} at first, {last:.3f} at last")


class Learner:
    """A model, what trains it (AdamW and a one-cycle schedule), and the loss of every step.

    Args:
        model: from inputs to logits.
        steps: how many there will be; the learning rate follows one cycle over them.
        rate: highest learning rate.
        loss: of outputs and labels. Default: cross-entropy.
    """

    def __init__(self, model: nn.Module, steps: int, rate: float, loss: Loss = F.cross_entropy):
        self.model, self.loss = model, loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, rate, total_steps=steps, pct_start=0.1)
        self.losses: list[float] = []

    def step(self, inputs: tuple, labels: Tensor) -> None:
        """One step of training: ``inputs`` are the model's positional arguments."""
        loss = self.loss(self.model(*inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())


def train(
    model: nn.Module, draw: Draw, steps: int, batch: int, rate: float = 3e-3, loss: Loss = F.cross_entropy
) -> list[float]:
    """Minimise a loss, see :class:`Learner`.

    Args:
        model: called with the arguments that ``draw`` returns.
        draw: draws a batch.
        steps, batch: how often, and how many examples a step.
        rate: highest learning rate.
        loss: of outputs and labels. Default: cross-entropy.

    Returns:
        The loss of every step.
    """
    learner = Learner(model, steps, rate, loss)
    losses = learner.losses
    start = time.perf_counter()
    model.train()
    with show_progress() as progress:
        task = progress.add_task("", total=steps, loss="")
        for _ in range(steps):
            learner.step(*draw(batch))
            progress.update(task, advance=1, loss=f"{sum(losses[-10:]) / len(losses[-10:]):.3f}")
    summarize(losses, batch, time.perf_counter() - start)
    return losses


@torch.no_grad()
def predict(model: nn.Module, draw: Draw, count: int, batch: int = 64) -> tuple[Tensor, Tensor]:
    """Predicted and true labels ``[count]`` of freshly drawn examples."""
    model.eval()
    predicted, true = [], []
    for start in range(0, count, batch):
        inputs, labels = draw(min(batch, count - start))
        predicted.append(model(*inputs).argmax(-1))
        true.append(labels)
    return torch.cat(predicted), torch.cat(true)


def report(predicted: Tensor, true: Tensor, names: Sequence[str], what: str = "new examples") -> float:
    """Print a table of confusions and the accuracy, beside that of guessing; return the accuracy."""
    table = Table(title=f"{len(true)} {what}: rows are the truth, columns what the model says")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row, name in enumerate(names):
        counts = torch.bincount(predicted[true == row], minlength=len(names)).tolist()
        table.add_row(name, *(f"[bold]{n}" if column == row else str(n or "") for column, n in enumerate(counts)))
    console.print(table)
    return accuracy(predicted, true, len(names))


def accuracy(predicted: Tensor, true: Tensor, classes: int, what: str = "accuracy") -> float:
    """Print the accuracy, beside that of guessing; return it."""
    share = (predicted == true).double().mean().item()
    console.print(f"{what}: {share:.1%} (guessing: {1 / classes:.1%})")
    return share


def new_figure(width: float, height: float):
    """A matplotlib figure that needs no display."""
    from matplotlib.figure import Figure  # here, as importing it takes a second that other parts need not wait

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    """Write the figure as PNG, and say where."""
    figure.savefig(path, dpi=90)
    console.print(f"picture: {path}", soft_wrap=True, markup=False)
