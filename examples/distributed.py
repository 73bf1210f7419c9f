"""One image on several processes: each makes and holds some rows, and no process ever has the whole.

    torchrun --nproc-per-node 4 examples/distributed.py --data 2

trains on a mesh of 2 x 2: two images at a time, the rows of each on two processes. In which fifth of the image, from top to
bottom, a bright spot is, is to be found; every process makes its own rows, and most see no spot. Before it trains, the sharded model is compared with one process that
has all rows: output, all gradients, and bytes sent for images of three sizes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from common import console, parse, positive
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import perceiver_fast as pf

CLASSES = 5
MODEL = dict(
    num_freq_bands=3, max_freq=10.0, depth=2, input_channels=1, num_latents=16, latent_dim=48, latent_heads=4,
    latent_dim_head=12, cross_heads=4, cross_dim_head=16, num_classes=CLASSES, weight_tie_layers=True,
)  # fmt: skip


def rows_of(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """A process' rows of an image: the first ones have one more where they do not divide evenly."""
    return size * rank // ranks, size * (rank + 1) // ranks


def spots(labels: Tensor, across: Tensor, size: int, start: int, stop: int) -> Tensor:
    """Rows start to stop of images ``[B, size, size, 1]`` of a spot: in the fifth of the label, ``across`` in [-1, 1]."""
    row = torch.linspace(0, CLASSES, size)[start:stop].view(1, -1, 1)
    column = torch.linspace(-1, 1, size).view(1, 1, -1)
    distance = (row - (labels + 0.5).view(-1, 1, 1)).square() + 4 * (column - across.view(-1, 1, 1)).square()
    return 3 * torch.exp(-8 * distance).unsqueeze(-1)


def compare(model: nn.Module, group: Any, size: int, device: torch.device) -> None:
    """The sharded model beside one process, in float64, on images that are small enough for both."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    alone = copy.deepcopy(model).double()
    shared = pf.distributed.shard(copy.deepcopy(alone), group)
    labels, across = torch.arange(2), torch.zeros(2)
    image = spots(labels, across, size, 0, size).to(device, torch.float64)
    start, stop = rows_of(size, rank, ranks)
    whole, part = alone(image), shared(image[:, start:stop])
    worst = float((whole - part).detach().abs().max())
    for each in (whole, part):
        nn.functional.cross_entropy(each, labels.to(device)).backward()
    gradients = max(float((p.grad - q.grad).abs().max()) for p, q in zip(alone.parameters(), shared.parameters()))
    assert worst < 1e-12 and gradients < 1e-12, (worst, gradients)
    if dist.get_rank() == 0:
        console.print(
            f"{ranks} processes share {size} rows: outputs within {worst:.1e} and gradients equal one process' within "
            f"{gradients:.1e}, in float64"
        )


def count_bytes(model: nn.Module, group: Any, device: torch.device) -> None:
    """Print what a process sends for a forward and a backward, for images of several sizes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shared = pf.distributed.shard(copy.deepcopy(model), group)
    table = Table(title="one training step, float32: what a process hands to collectives")
    for column in ("pixels", "messages", "bytes", "bytes of the image"):
        table.add_column(column, justify="right")
    reduce, sent = dist.all_reduce, []

    def counted(tensor: Tensor, *args: Any, **keywords: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **keywords)

    dist.all_reduce = counted
    try:
        for size in (32, 64, 128):
            sent.clear()
            image = spots(torch.zeros(1), torch.zeros(1), size, *rows_of(size, rank, ranks)).to(device)
            shared(image).sum().backward()
            table.add_row(f"{size * size:,}", str(len(sent)), f"{sum(sent):,}", f"{4 * size * size:,}")
    finally:
        dist.all_reduce = reduce
    if dist.get_rank() == 0:
        console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=positive, default=1, help="images at a time (default: %(default)s)")
        parser.add_argument("--size", type=positive, default=64, help="pixels along an axis (default: %(default)s)")
        parser.add_argument("--steps", type=positive, help="of training (default: 200; with --quick 10)")

    args = parse(__doc__, argv, add_options)
    if not dist.is_torchelastic_launched():
        raise SystemExit("expected torchrun to start this; try: torchrun --nproc-per-node 2 examples/distributed.py")
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    if ranks % args.data:
        raise SystemExit(f"expected --data to divide {ranks} processes, got {args.data}")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (args.data, ranks // args.data), mesh_dim_names=("data", "tokens"))
    group = mesh["tokens"].get_group()
    torch.manual_seed(args.seed)  # the same weights everywhere
    model = pf.Perceiver(**MODEL).to(device)
    compare(model, group, 24, device)
    count_bytes(model, group, device)

    pf.distributed.shard(model, mesh["tokens"])
    trained = nn.parallel.DistributedDataParallel(model, process_group=mesh["data"].get_group())
    rule = torch.optim.AdamW(trained.parameters(), lr=5e-3)
    start, stop = rows_of(args.size, mesh["tokens"].get_local_rank(), ranks // args.data)
    draws = torch.Generator().manual_seed(args.seed + mesh["data"].get_local_rank())  # alike along the tokens
    steps, right, asked = args.steps or (10 if args.quick else 200), 0, 0
    for step in track(range(steps), "training", console=console, disable=dist.get_rank() > 0):
        labels = torch.randint(CLASSES, (16,), generator=draws)
        across = torch.rand(16, generator=draws) * 2 - 1
        logits = trained(spots(labels, across, args.size, start, stop).to(device))
        loss = nn.functional.cross_entropy(logits, labels.to(device))
        rule.zero_grad()
        loss.backward()
        rule.step()
        if step >= steps - max(1, steps // 5):
            right, asked = right + int((logits.argmax(1).cpu() == labels).sum()), asked + len(labels)
    if dist.get_rank() == 0:
        console.print(
            f"{steps} steps on {args.data} x {ranks // args.data} processes of {stop - start} rows: loss "
            f"{loss.item():.3f}, {100 * right / asked:.0f}% of the last images right ({100 // CLASSES}% by guessing)"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
