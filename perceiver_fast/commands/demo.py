"""The demo: a photograph at full resolution through perceiver-pytorch and perceiver-fast, with the same weights.

Prints time, memory and how far the outputs differ, and draws where latents look.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.commands import demo_process, info
from perceiver_fast.commands.demo_process import Report
from perceiver_fast.commands.options import positive
from perceiver_fast.insight import geometries

SEED = 0
TOLERANCE = 1e-3  # of the largest output: rounding in float32 stays far below
INSTALL = "pip install -e '.[demo]'"
REQUIRED = {"matplotlib": "matplotlib", "PIL": "pillow", "psutil": "psutil", "sklearn": "scikit-learn"}
PICTURED = "imagenet-lucid-1"

# The arguments of the models that are compared; their inputs are the photograph.
GEOMETRIES = {name: geometries.GEOMETRIES[name].arguments for name in ("readme", "imagenet-lucid-1")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to ``parser``."""
    parser.description = __doc__
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="the photograph (default: china.jpg of scikit-learn, 427 x 640)")
    add("--max-side", type=positive, metavar="N", help="scale the photograph down to at most N x N, for quick tests")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where attention.png goes (default: %(default)s)")
    add("--json", type=Path, metavar="PATH", help="also store the rows and conditions as JSON")
    add("--repeats", type=positive, default=3, metavar="N", help="timed runs, after a warm-up (default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add(
        "--geometry",
        action="append",
        choices=list(GEOMETRIES),
        help="a model to compare, repeatable (default: all). readme: the one of perceiver-pytorch's README, depth 6; "
        "imagenet-lucid-1: the paper's ImageNet model in perceiver-pytorch's layout, one of its 8 blocks",
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0, or 1 if perceiver-fast fails or is off, or 2 if something the demo needs is missing."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe has no width of its own
    if missing := [package for module, package in REQUIRED.items() if not _installed(module)]:
        print(f"demo: needs {', '.join(missing)}: {INSTALL}", file=sys.stderr)
        return 2
    try:
        photo = load_photo(args.image, args.max_side)
        for folder in (args.out, *([args.json.parent] if args.json else [])):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    if extension.error:
        console.rule("[bold red]THE C++ KERNELS DO NOT RUN", style="red")
        console.print(f"{extension.error}. What follows is plain PyTorch.", style="bold red", markup=False)
    if not _installed("perceiver_pytorch"):
        console.print(f"perceiver-pytorch is not installed, so nothing is compared: {INSTALL}", markup=False)

    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    names = list(dict.fromkeys(args.geometry or GEOMETRIES))
    rows = []
    with _progress(console) as report:
        for name in names:
            rows += compare(name, photo, args.repeats, threads, report)
        picture = draw_attention(photo, args.out / "attention.png", report)

    conditions = describe_conditions(args.image, photo, threads, args.repeats)
    show(console, rows, conditions)
    console.print(f"Where latents look: {picture}", markup=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")
    return 0 if all(_sound(row) for row in rows) else 1


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _sound(row: dict) -> bool:
    if row["model"] != "perceiver-fast":
        return True
    difference = row["max_relative_difference"]
    return row["seconds"] is not None and (difference is None or difference < TOLERANCE)


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    """What takes lines of progress: a spinner on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        with console.status("starting") as status:
            yield status.update
    else:
        yield lambda line: console.print(line, markup=False, highlight=False)


def load_photo(path: Path | None, max_side: int | None = None) -> Tensor:
    """A photograph as float32 ``[1, H, W, 3]`` in [0, 1]; without a path, scikit-learn's china.jpg."""
    import numpy as np
    from PIL import Image, ImageOps
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")) if path is None else Image.open(path)
    image = ImageOps.exif_transpose(image).convert("RGB")
    if max_side:
        image.thumbnail((max_side, max_side))
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)


def initial_weights(arguments: dict) -> dict[str, Tensor]:
    """The state_dict both models load: perceiver-pytorch's initial weights, or this package's where it is missing."""
    library = importlib.import_module("perceiver_pytorch" if _installed("perceiver_pytorch") else "perceiver_fast")
    torch.manual_seed(SEED)
    return library.Perceiver(**arguments).state_dict()


def compare(name: str, photo: Tensor, repeats: int, threads: int, report: Report) -> list[dict]:
    """Rows of one geometry: perceiver-pytorch, where it is installed, and perceiver-fast."""
    arguments = GEOMETRIES[name]
    rows, outputs = [], []
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        report(f"{name}: making the weights")
        weights = initial_weights(arguments)
        demo_process.write_task(folder, arguments, weights, photo, repeats, threads)
        weight_bytes = sum(t.nbytes for t in weights.values())
        del weights  # the measured processes need the memory
        for library in ("perceiver_pytorch", "perceiver_fast"):
            if not _installed(library):
                continue
            row, output = _row(name, library, folder, photo, weight_bytes, report)
            rows.append(row)
            outputs.append(output)
    if len(rows) == 2 and None not in outputs:
        original, fast = outputs
        rows[1]["max_relative_difference"] = float((fast - original).abs().max() / original.abs().max())
        rows[1]["speedup"] = rows[0]["seconds"] / rows[1]["seconds"]
    return rows


def _row(
    name: str, library: str, folder: Path, photo: Tensor, weight_bytes: int, report: Report
) -> tuple[dict, Tensor | None]:
    """Measure one model; the row holds None for what could not be measured, and a note that says why."""
    model = library.replace("_", "-")
    row = {"geometry": name, "depth": GEOMETRIES[name]["depth"], "model": model, "note": None}
    row |= dict.fromkeys(("seconds", "all_seconds", "peak_bytes_added", "max_relative_difference", "speedup"))
    if library == "perceiver_pytorch":
        sizes = photo.shape[1:-1]
        row["estimated_bytes_added"] = demo_process.original_bytes(GEOMETRIES[name], sizes)
        needed, free = (
            demo_process.original_needs(GEOMETRIES[name], sizes, weight_bytes),
            demo_process.available_memory(),
        )
        if needed > free:
            row["note"] = f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free: not run"
            return row, None
    try:
        result = demo_process.run(library, folder, lambda line: report(f"{name}: {model}: {line}"))
    except demo_process.MeasureError as error:
        row["note"] = str(error)
        return row, None
    row |= {
        "seconds": median(result["seconds"]),
        "all_seconds": result["seconds"],
        "peak_bytes_added": result["peak_bytes_added"],
    }
    if "paths" in result:
        row["paths"] = dict(Counter(result["paths"]))
    return row, result["output"]


def draw_attention(photo: Tensor, path: Path, report: Report) -> Path:
    """Save where six of the first 64 latents look; returns the path."""
    report("picture: making the weights")
    torch.manual_seed(SEED)
    model = pf.Perceiver(**GEOMETRIES[PICTURED])
    channels = model.input_dim - model.input_channels
    report("picture: looking for latents of contrast")
    latents = pf.contrasting_latents(model, photo, candidates=64, count=6)
    maps = pf.attention_map(model, photo, latents=latents, heads="mean")[0]
    caption = (
        f"Cross-attention of {PICTURED}'s first block with UNTRAINED weights (random, seed {SEED}): with them a "
        f"token's {channels} position channels outweigh its 3 colours, hence the bands. "
        "The six latents of the first 64 with the most contrast. Attention relative to uniform, each map on its own "
        "logarithmic scale from its 1st to its 99th percentile."
    )
    report("picture: drawing")
    figure = pf.plot_attention_map(maps, photo[0], latents=latents, scale="log", shared=False, caption=caption)
    figure.savefig(path)
    return path


def describe_conditions(image: Path | None, photo: Tensor, threads: int, repeats: int) -> dict:
    """What the numbers hold for."""
    collected = info.collect()
    original = importlib.metadata.version("perceiver-pytorch") if _installed("perceiver_pytorch") else None
    _, height, width, _ = photo.shape
    return {
        "image": "china.jpg of scikit-learn" if image is None else image.name,
        "height": height,
        "width": width,
        "tokens": height * width,
        "dtype": str(photo.dtype).removeprefix("torch."),
        "cpu": collected["cpu"],
        "isa": collected["extension"].get("active_isa"),
        "threads": threads,
        "torch": collected["torch"],
        "perceiver_pytorch": original,
        "perceiver_fast": collected["perceiver_fast"],
        "repeats": repeats,
        "seed": SEED,
    }


def show(console: Console, rows: list[dict], conditions: dict) -> None:
    """Print the table, the paths of the layers and the conditions."""
    table = Table(title="One photograph, the same weights", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("geometry", min_width=max(map(len, GEOMETRIES)))
    table.add_column("model", min_width=len("perceiver-pytorch"))
    for header in ("time", "peak memory\nadded", "max relative\ndifference", "speed-up"):
        table.add_column(header, justify="right")
    for i, row in enumerate(rows):
        first = i == 0 or rows[i - 1]["geometry"] != row["geometry"]
        if first and i:
            table.add_section()
        table.add_row(
            f"{row['geometry']}\ndepth {row['depth']}" if first else "",
            row["model"] + (f"\n[yellow]{row['note']}" if row["note"] else ""),
            _format(row["seconds"], "{:.3f} s"),
            _format(row["peak_bytes_added"], "{:,.0f} MB", 1e-6),
            _format(row["max_relative_difference"], "{:.1e}"),
            _format(row["speedup"], "[bold green]{:.1f} x"),
        )
    console.print(table)
    for row in rows:
        if "paths" in row:
            paths = ", ".join(f"{count} x {path}" for path, count in row["paths"].items())
            console.print(f"{row['geometry']}: perceiver-fast ran {paths}", markup=False, highlight=False)
    c = conditions
    versions = f"perceiver-pytorch {c['perceiver_pytorch'] or 'not installed'}, perceiver-fast {c['perceiver_fast']}"
    lines = (
        f"{c['image']}, {c['height']} x {c['width']} = {c['tokens']:,} tokens, batch 1, {c['dtype']}, inference",
        f"{c['cpu']}, {c['isa'] or 'no C++ kernels'}, threads: {c['threads']}; torch {c['torch']}, {versions}",
        f"time: median of {c['repeats']}, after a warm-up; speed-up: perceiver-pytorch's time over perceiver-fast's",
        "peak memory added: rise of a fresh process's peak resident memory above its level before the first forward",
        "max relative difference: max |a - b| / max |b| of the logits, b perceiver-pytorch's",
    )
    console.print("\n".join(lines), markup=False, highlight=False)


def _format(number: float | None, form: str, factor: float = 1) -> str:
    return "-" if number is None else form.format(number * factor)
