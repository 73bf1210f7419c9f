"""An image that is larger than memory: made on a disk, attended to in chunks of rows, and trained on.

The picture is waves of two directions, eight bits a channel. A Perceiver reads it as `pf.stream`: one chunk of rows exists
at a time, in the forward and in the backward. With `--size 65536` it has 4.3 billion pixels, 12.9 GB.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from common import console, parse, positive
from rich.progress import track
from rich.table import Table
from torch import Tensor

import perceiver_fast as pf

MODEL = dict(num_freq_bands=6, max_freq=64.0, depth=1, num_latents=32, latent_dim=64, num_classes=10)
ROWS = 64  # made at a time


def to_numbers(pixels: Tensor) -> Tensor:
    """Eight bits to [0, 1]."""
    return pixels.float() / 255


def make(path: Path, size: int) -> np.memmap:
    """An image ``[size, size, 3]`` of waves in a file, made some rows at a time."""
    free = shutil.disk_usage(path.parent).free
    if free < 3 * size * size * 1.05:
        console.print(
            f"expected {3 * size * size / 1e9:.1f} GB free in {path.parent}, got {free / 1e9:.1f}; see --folder"
        )
        sys.exit(2)
    across = np.arange(size, dtype="float32") * (2 * np.pi / 37)
    waves = np.stack([across, across * 0.7, across * 0.3], -1)  # [size, 3]
    with path.open("wb") as file:
        for start in track(range(0, size, ROWS), f"making {3 * size * size / 1e9:.2f} GB", console=console):
            down = np.arange(start, min(start + ROWS, size), dtype="float32")[:, None, None] * (2 * np.pi / 53)
            (127.5 * np.sin(waves + down) + 127.5).astype("uint8").tofile(file)
    return np.memmap(path, "uint8", "r", shape=(size, size, 3))


def peak() -> float:
    """The most memory that this process has had, in GB; pages of files that it had mapped at the time are among it."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9


def read_alone(image: np.memmap) -> float:
    """Seconds to read the file by itself, some rows at a time."""
    start = time.perf_counter()
    for chunk in pf.stream(image, rows=256).chunks(4):
        chunk.data.sum()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", type=positive, help="pixels along an axis (default: 16384; with --quick 1024)")
        parser.add_argument("--rows", type=positive, help="of a chunk (default: 16 MiB of float32)")
        parser.add_argument("--folder", type=Path, help="where the image is made (default: for temporary files)")
        parser.add_argument("--no-step", action="store_true", help="leave out the training step")

    args = parse(__doc__, argv, add_options)
    size = args.size or (1024 if args.quick else 16384)
    model = pf.Perceiver(**MODEL)
    before = peak()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        begun = time.perf_counter()
        image = make(Path(folder, "image"), size)
        made = time.perf_counter() - begun
        reading = read_alone(image)
        rows = args.rows or (128 if args.quick else None)
        source = pf.stream(image, rows=rows, transform=to_numbers, progress=console.is_terminal)
        table = Table(title=f"{size:,} x {size:,} x 3, {image.nbytes / 1e9:.2f} GB, {args.threads} threads")
        for column in ("", "seconds", "million pixels/s", "billion pairs/s", "most memory, GB"):
            table.add_column(column, justify="left" if not column else "right")

        def report(name: str, seconds: float, passes: int = 0) -> None:
            pixels = size * size / seconds
            pairs = f"{passes * pixels * MODEL['num_latents'] / 1e9:.2f}" if passes else ""
            table.add_row(name, f"{seconds:.2f}", f"{pixels / 1e6:.1f}", pairs, f"{peak():.2f}")

        report("made", made)
        report("read alone", reading)
        model.eval()
        with torch.no_grad():
            begun = time.perf_counter()
            logits = model(source)
            report("forward", time.perf_counter() - begun, 1)
        if not args.no_step:
            model.train()
            rule = torch.optim.AdamW(model.parameters(), lr=1e-3)
            begun = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(model(source), torch.tensor([3]))
            loss.backward()
            rule.step()
            report("training step", time.perf_counter() - begun, 1)
        if size <= 2048:  # small enough to compare with the tensor
            whole = to_numbers(torch.from_numpy(np.array(image))).unsqueeze(0)
            model = pf.Perceiver(**MODEL)
            with torch.no_grad():
                difference = float((model(source) - model(whole)).abs().max() / model(whole).abs().max())
            console.print(f"largest difference from the tensor's logits: {difference:.1e} of the largest")
    console.print(table)
    console.print(
        f"{before:.2f} GB before there was an image; logits {[round(v, 3) for v in logits[0].tolist()[:3]]} .."
    )


if __name__ == "__main__":
    main()
