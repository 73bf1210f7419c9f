"""``python -m benchmarks.sweep``: models of sizes drawn at random, beside perceiver-pytorch, to find where ours is slower.

Every model is drawn from its seed alone: axes, sizes, channels, latents, heads, depth, ties, batch. Both sides have the same
weights and take turns. Outputs are held against perceiver-pytorch's in
float64: an error of more than twice its own ends the run with 1.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import perceiver_fast as pf
from benchmarks.environment import conditions
from benchmarks.output import deliver, milliseconds, table, times_ours
from benchmarks.sides import DTYPES
from benchmarks.statistic import seconds_of

PASSES = ("forward", "step")
MOST_WORK, MOST_LOGITS = (
    6e9,
    1.2e8,
)  # multiply-adds of a forward, and logits that perceiver-pytorch keeps: seconds, gigabytes
TURN = 0.05  # seconds that one side has before the other's turn
FLOOR = 1e-5  # of errors


def draw(generator: random.Random) -> tuple[dict, int, list[int]]:
    """A model's arguments, a batch and the sizes of its axes, small enough for a short turn."""
    pick = generator.choice
    while True:
        axes = pick([1, 1, 2, 2, 2, 3])
        side = pick([4, 8, 14, 28, 32, 64, 96])
        sizes = {
            1: [pick([16, 50, 200, 784, 1024, 4096, 10000])],
            2: [side, side + pick([0, 0, 3])],
            3: [pick([4, 8, 16])] * 3,
        }
        size, batch = sizes[axes], pick([1, 1, 2, 4, 8, 16, 32, 64])
        model = dict(
            input_channels=pick([1, 1, 2, 3, 3, 4, 13, 32, 64, 128]),
            input_axis=axes,
            num_freq_bands=pick([2, 4, 6, 6, 8, 16, 32]),
            max_freq=pick([5.0, 10.0, 100.0]),
            depth=pick([1, 2, 3, 4, 6]),
            num_latents=pick([4, 8, 16, 32, 50, 64, 100, 128, 256]),
            latent_dim=pick([16, 24, 32, 48, 64, 96, 100, 128, 192, 256, 384, 512]),
            cross_heads=pick([1, 1, 1, 2, 4]),
            latent_heads=pick([1, 2, 4, 8, 8]),
            cross_dim_head=pick([16, 32, 64, 64]),
            latent_dim_head=pick([8, 16, 32, 64, 64]),
            num_classes=pick([2, 10, 100, 1000]),
            weight_tie_layers=pick([True, False]),
            self_per_cross_attn=pick([1, 1, 1, 2, 4]),
            fourier_encode_data=generator.random() > 0.1,
        )
        tokens, latents, depth = prod(size), model["num_latents"], model["depth"]
        channels = model["input_channels"] + axes * (2 * model["num_freq_bands"] + 1)
        inner = model["cross_heads"] * model["cross_dim_head"]
        work = 2 * tokens * inner * (channels + latents)
        work += 12 * latents * model["latent_dim"] ** 2 * (1 + model["self_per_cross_attn"])
        logits = batch * depth * tokens * latents * model["cross_heads"]
        if batch * depth * work < MOST_WORK and logits < MOST_LOGITS:
            return model, batch, size


def call_of(model: nn.Module, data: Tensor, step: bool, dtype: str) -> Callable[[], Tensor]:
    """What is timed: the output, in a step with the gradients of a mean square."""

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), torch.set_grad_enabled(step):
            out = model(data)
        if step:
            out.float().square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = None
        return out

    model.train(step)
    return call


def in_turns(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call."""
    for _ in range(3):
        once = [seconds_of(call) for call in calls]
    repeats = max(1, int(TURN / max(once)))
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, found):
            seconds.append(sum(seconds_of(call) for _ in range(repeats)) / repeats)
    return [statistics.median(seconds) for seconds in found]


def measure(seed: int, dtype: str, dropouts: dict[str, float], rounds: int) -> dict:
    """One model: what it is, seconds of both sides for each pass, and both errors."""
    from perceiver_pytorch import Perceiver

    drawn, batch, size = draw(random.Random(seed))
    torch.manual_seed(seed)
    arguments = drawn | dropouts
    theirs = Perceiver(**arguments)
    ours = pf.Perceiver(**arguments)
    ours.load_state_dict(theirs.state_dict())
    data = torch.randn(batch, *size, drawn["input_channels"])
    exact = Perceiver(**drawn).double()
    exact.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        truth = exact.eval()(data.double())
    del exact
    row: dict = {"seed": seed, "model": drawn, "batch": batch, "size": size}
    for name in PASSES:
        calls = [call_of(model, data, name == "step", dtype) for model in (theirs, ours)]
        if name == "forward":
            errors = [((call().double() - truth).norm() / truth.norm()).item() for call in calls]
            row["errors"] = dict(zip(("eager", "ours"), errors))
        row[name] = dict(zip(("eager", "ours"), in_turns(calls, rounds)))
    return row


def described(row: dict) -> str:
    """A drawn model in one line."""
    model = row["model"]
    sizes = " x ".join(map(str, row["size"]))
    kind = "" if model["fourier_encode_data"] else ", dense"
    blocks = f"{model['depth']} x {model['self_per_cross_attn']}{' tied' if model['weight_tie_layers'] else ''}"
    return (
        f"{row['seed']}: {row['batch']} x {sizes} of {model['input_channels']}{kind}; {model['num_latents']} latents of "
        f"{model['latent_dim']}, {blocks}; heads {model['cross_heads']} of {model['cross_dim_head']}, "
        f"{model['latent_heads']} of {model['latent_dim_head']}"
    )


def ratio(row: dict, name: str) -> float:
    """perceiver-pytorch's time over ours."""
    return row[name]["eager"] / row[name]["ours"]


def summary(rows: list[dict], name: str) -> str:
    """The spread of the ratios of one pass."""
    ratios = sorted(ratio(row, name) for row in rows)
    slower = sum(r < 1 for r in ratios)
    return (
        f"{name}: median {statistics.median(ratios):.2f}x, from {ratios[0]:.2f}x to {ratios[-1]:.2f}x, {slower} slower"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=int, default=50, help="how many (default: 50, some two minutes)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others' follow (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bfloat16: autocast (default: float32)")
    parser.add_argument("--attn-dropout", type=float, default=0.0, help="in steps (default: 0)")
    parser.add_argument("--ff-dropout", type=float, default=0.0, help="in steps (default: 0)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help='write the numbers; "-" prints them')
    args = parser.parse_args(argv)
    if args.models < 1 or args.rounds < 1:
        parser.error(f"expected at least one model and one round, got {args.models} and {args.rounds}")
    before, console = conditions(torch.get_num_threads()), Console(stderr=str(args.json) == "-")
    dropouts = {"attn_dropout": args.attn_dropout, "ff_dropout": args.ff_dropout}
    seeds = range(args.seed, args.seed + args.models)
    rows = [
        measure(seed, args.dtype, dropouts, args.rounds)
        for seed in track(seeds, "models", console=Console(stderr=True))
    ]
    wrong = [row for row in rows if row["errors"]["ours"] > 2 * row["errors"]["eager"] + FLOOR]

    def show() -> None:
        lines = []
        for row in sorted(rows, key=lambda row: min(ratio(row, name) for name in PASSES)):
            ratios = [times_ours(ratio(row, name)) for name in PASSES]
            lines.append([described(row), *(milliseconds(row[name]["ours"]) for name in PASSES), *ratios])
        headings = ["seed: batch x size of channels; latents; heads", *PASSES, "forward, over", "step, over"]
        console.print(table(f"perceiver-fast, and perceiver-pytorch's time over it: {args.dtype}", headings, lines))
        for name in PASSES:
            console.print(summary(rows, name))

    options = {"dtype": args.dtype, "rounds": args.rounds, **dropouts}
    deliver({"conditions": before, **options, "rows": rows}, args.json, show)
    for row in wrong:
        console.print(f"[red]wrong:[/red] {described(row)}: errors {row['errors']}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
