"""The demo: a photograph at full resolution through perceiver-pytorch and perceiver-fast, with the same weights.

Prints time, memory and how far the outputs differ, and draws where latents look.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import perceiver_fast as pf
from perceiver_fast import extension, installation
from perceiver_fast.commands import demo_process, make_folder
from perceiver_fast.commands.demo_process import FAST, ORIGINAL, SEED
from perceiver_fast.commands.options import COMPARED
from perceiver_fast.insight import geometries
from perceiver_fast.insight.console import CannotRun, Report, plain_table, progress, wide_console
from perceiver_fast.insight.environment import cpu_name, package_version
from perceiver_fast.insight.geometries import Geometry

TOLERANCE = 1e-3  # of the largest output: rounding in float32 stays far below
INSTALL = installation.install("demo")
REQUIRED = {"matplotlib": "matplotlib", "PIL": "pillow", "psutil": "psutil", "sklearn": "scikit-learn"}
PICTURED = "imagenet-lucid-1"

# The models that are compared; their input is the photograph.
GEOMETRIES = {name: geometries.GEOMETRIES[name] for name in COMPARED}


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns 0, or 1 if perceiver-fast fails or is off.

    Raises:
        CannotRun: a package, the photograph or a folder is missing.
    """
    if missing := [package for module, package in REQUIRED.items() if not importlib.util.find_spec(module)]:
        raise CannotRun(f"needs {', '.join(missing)}: {INSTALL}")
    try:
        photo = load_photo(args.image, args.max_side)
    except OSError as error:
        raise CannotRun(str(error)) from None
    for folder in (args.out, *([args.json.parent] if args.json else [])):
        make_folder(folder)
    console = wide_console()
    if extension.error:
        console.rule("[bold red]THE C++ KERNELS DO NOT RUN", style="red")
        console.print(f"{extension.error}. What follows is plain PyTorch.", style="bold red", markup=False)
    if not package_version(ORIGINAL):
        console.print(f"perceiver-pytorch is not installed, so nothing is compared: {INSTALL}", markup=False)

    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    with progress() as say:
        for name in dict.fromkeys(args.geometry or GEOMETRIES):
            rows += compare(GEOMETRIES[name], photo, args.repeats, threads, say)
        picture = draw_attention(photo, args.out / "attention.png", say)

    conditions = describe_conditions(args.image, photo, threads, args.repeats)
    show(console, rows, conditions)
    console.print(f"Where latents look: {picture}", markup=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions, "rows": rows}, indent=2) + "\n")
    return 0 if all(_sound(row) for row in rows) else 1


def _sound(row: dict) -> bool:
    difference = row["max_relative_difference"]
    return row["model"] == ORIGINAL or row["seconds"] is not None and (difference is None or difference < TOLERANCE)


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


def compare(geometry: Geometry, photo: Tensor, repeats: int, threads: int, say: Report) -> list[dict]:
    """Rows of one geometry: perceiver-pytorch, where it is installed, and perceiver-fast.

    A row holds None for what could not be measured, and then a note that says why.
    """
    geometry = replace(geometry, sizes=tuple(photo.shape[1:-1]))
    rows, outputs = [], []
    for model in (ORIGINAL, FAST) if package_version(ORIGINAL) else (FAST,):
        row = {"geometry": geometry.name, "depth": geometry.model["depth"], "model": model, "note": None}
        row |= dict.fromkeys(("seconds", "all_seconds", "peak_bytes_added", "max_relative_difference", "speedup"))
        if model == ORIGINAL:
            row["estimated_bytes_added"] = demo_process.original_bytes(geometry)
        rows.append(row)
        line = partial(say, f"{geometry.name}: {model}")
        try:
            found = demo_process.measure(model, geometry, photo, repeats, threads, line)
        except demo_process.MeasureError as error:
            row["note"] = str(error)
            continue
        outputs.append(found.pop("output"))
        row |= found | {"all_seconds": found["seconds"], "seconds": median(found["seconds"])}
    if len(outputs) == 2:
        original, fast = outputs
        rows[1]["max_relative_difference"] = float((fast - original).abs().max() / original.abs().max())
        rows[1]["speedup"] = rows[0]["seconds"] / rows[1]["seconds"]
    return rows


def draw_attention(photo: Tensor, path: Path, say: Report) -> Path:
    """Save where six of the first 64 latents look; returns the path."""
    say("picture", "making the weights")
    model: Any = demo_process.build(FAST, GEOMETRIES[PICTURED])
    channels = model.input_dim - model.input_channels
    say("picture", "looking for latents of contrast")
    latents = pf.contrasting_latents(model, photo, candidates=64, count=6)
    maps = pf.attention_map(model, photo, latents=latents, heads="mean")[0]
    caption = (
        f"Cross-attention of {PICTURED}'s first block with UNTRAINED weights (random, seed {SEED}): with them a "
        f"token's {channels} position channels outweigh its 3 colours, hence the bands. "
        "The six latents of the first 64 with the most contrast. Attention relative to uniform, each map on its own "
        "logarithmic scale from its 1st to its 99th percentile."
    )
    say("picture", "drawing")
    figure = pf.plot_attention_map(maps, photo[0], latents=latents, scale="log", shared=False, caption=caption)
    figure.savefig(path)
    return path


def describe_conditions(image: Path | None, photo: Tensor, threads: int, repeats: int) -> dict:
    """What the numbers hold for."""
    _, height, width, _ = photo.shape
    return {
        "image": "china.jpg of scikit-learn" if image is None else image.name,
        "height": height, "width": width, "tokens": height * width, "dtype": str(photo.dtype).removeprefix("torch."),
        "cpu": cpu_name(), "isa": extension.module.active_isa() if extension.module else None, "threads": threads,
        "torch": torch.__version__, "perceiver_pytorch": package_version(ORIGINAL), "perceiver_fast": pf.__version__,
        "repeats": repeats, "seed": SEED,
    }  # fmt: skip


def show(console: Console, rows: list[dict], conditions: dict) -> None:
    """Print the table, the paths of the layers and the conditions."""
    numbers = ("time", "peak memory\nadded", "max relative\ndifference", "speed-up")
    table = plain_table("geometry", "model", numbers=numbers, title="One photograph, the same weights")
    previous = None
    for row in rows:
        first, previous = row["geometry"] != previous, row["geometry"]
        if first:
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
