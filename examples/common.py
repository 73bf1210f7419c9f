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
    console.width = max(console.width, 120)  # a file or a pipe has no width of its own

# draw(batch size) -> the model's positional arguments, and labels [batch]
Draw = Callable[[int], tuple[tuple, Tensor]]


def parse(
    description: str | None,
    argv: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The options of every example and its own, read and obeyed: the seed is set, the folder for pictures exists."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few training steps, enough to see that it learns")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    # These models are small: on a busy machine a second thread is waited for more than it helps.
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


def train(model: nn.Module, draw: Draw, steps: int, batch: int, rate: float = 3e-3) -> list[float]:
    """Minimise the cross-entropy with AdamW and a one-cycle schedule.

    Args:
        model: called with the arguments that ``draw`` returns; gives logits.
        draw: draws a batch.
        steps, batch: how often, and how many examples a step.
        rate: highest learning rate.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    with show_progress() as progress:
        task = progress.add_task("", total=steps, loss="")
        for _ in range(steps):
            inputs, labels = draw(batch)
            loss = F.cross_entropy(model(*inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
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
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    """Write the figure as PNG, and say where."""
    figure.savefig(path, dpi=90)
    console.print(f"picture: {path}", soft_wrap=True, markup=False)
