"""``python docs/make_accuracy.py``: the table of accuracy.md, errors of both libraries against float64.

Models have the structure, bands and frequencies of published ones, and fewer tokens and latents; weights are initial ones,
the cross-attentions' queries ten times as large, so that attention is sharper than before training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # this checkout's package

import torch
from torch import Tensor, nn

from perceiver_fast.insight.geometries import GEOMETRIES, Geometry
from perceiver_fast.insight.peer import peer_model

PAGE = HERE / "accuracy.md"
START, END = "<!-- table: python docs/make_accuracy.py -->", "<!-- end of the table -->"
SIZES = {"readme": (32, 32), "imagenet-lucid": (32, 32), "imagenet-paper": (32, 32), "hf-conv": (24, 24)}
SIZES |= {"video": (4, 16, 16), "inverted": (32, 32), "audio": (2048,), "points": (1024,), "io-32": (1024,)}
SIZES |= {"io-512": (1024,)}
SHARPER = 10
SEEDS = 5
MEASURED = ("output, float32", "gradients, float32", "output, autocast to bfloat16", "output, bfloat16")
MODELS = ("perceiver-pytorch", "perceiver-fast")


def smaller(name: str, sizes: tuple[int, ...]) -> Geometry:
    """A geometry with few latents of few channels, and at most two blocks."""
    geometry = GEOMETRIES[name]
    few = {"num_latents": 64, "latent_dim": 64, "num_classes": 10, "depth": min(2, geometry.model["depth"])}
    few |= {"self_per_cross_attn": min(1, geometry.model.get("self_per_cross_attn", 1))}
    model = {**geometry.model, **{key: value for key, value in few.items() if key in geometry.model}}
    return replace(geometry, sizes=sizes, model=model)


def results(model: nn.Module, data: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output, and the gradients of a weighted sum of it by all parameters, joined; float64."""
    model.zero_grad()
    output = model.to(dtype)(data.to(dtype))
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (output * weight.to(dtype)).sum().backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return output.detach().double(), gradients


def relative(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the truth's norm."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def errors(geometry: Geometry, seed: int) -> list[tuple[float, float]]:
    """Errors of perceiver-pytorch and of perceiver-fast, MEASURED; the truth is perceiver-pytorch in float64."""
    torch.manual_seed(seed)
    theirs, ours = peer_model(geometry), geometry.build()
    weights = {k: v * SHARPER if "cross_attn.fn.to_q" in k else v for k, v in theirs.state_dict().items()}
    for model in (theirs, ours):
        model.load_state_dict(weights)
    data = geometry.input()
    truth = results(theirs, data, torch.float64)
    columns = list(zip(*([relative(*p) for p in zip(results(m, data, torch.float32), truth)] for m in (theirs, ours))))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            columns.append(tuple(relative(model.float()(data), truth[0]) for model in (theirs, ours)))
        columns.append(tuple(relative(model.bfloat16()(data.bfloat16()), truth[0]) for model in (theirs, ours)))
    return columns


def table(names: Sequence[str], seeds: int, report: Callable[[str], None]) -> list[dict]:
    """A row for every model: its tokens, and the two libraries' errors, geometric means over the seeds' weights."""
    rows = []
    for name in names:
        report(name)
        geometry = smaller(name, SIZES[name])
        found = torch.tensor([errors(geometry, seed) for seed in range(seeds)]).log().mean(0).exp()
        size = " x ".join(map(str, geometry.sizes))
        pairs = (dict(zip(MODELS, pair)) for pair in found.tolist())
        rows.append({"model": name, "tokens": size} | dict(zip(MEASURED, pairs)))
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as a table; of every pair the first is perceiver-pytorch's."""
    lines = ["| " + " | ".join(("model", "tokens", *MEASURED)) + " |", "| --- | --- |" + " --- |" * len(MEASURED)]
    for row in rows:
        pairs = (" / ".join(f"{row[header][model]:.1e}" for model in MODELS) for header in MEASURED)
        lines.append(f"| `{row['model']}` | {row['tokens']} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the table into the page; returns 0, or 2 without perceiver-pytorch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", action="append", choices=list(SIZES), help="only this; repeatable (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="initial weights of each (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="print the table and leave the page alone")
    parser.add_argument("--json", action="store_true", help="print JSON and leave the page alone")
    args = parser.parse_args(argv)
    try:
        rows = table(args.model or list(SIZES), args.seeds, lambda name: print(name, file=sys.stderr, flush=True))
    except ModuleNotFoundError as error:
        print(f"make_accuracy: {error}: pip install perceiver-pytorch==0.11.0", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(rows, indent=2))
    elif args.print or args.model or args.seeds != SEEDS:
        print(markdown(rows))
    else:
        before, rest = PAGE.read_text().split(START)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{START}\n\n{markdown(rows)}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
