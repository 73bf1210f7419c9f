"""``python -m benchmarks.accelerate``: transformers' Perceiver models as they are and accelerated, at their published sizes.

Weights are random: the published ones take the same time. Both sides are one model, with and without ``pf.accelerate``,
timed in turns; outputs are compared first. On a busy machine look at processor time, which other work changes less. Memory and counted work are those of a process of its own. The floor is what
the counted multiply-adds take at the rate of the fastest library at large products, that is, if nothing else took time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import perceiver_fast as pf
from benchmarks.environment import DEFAULT_THREADS, conditions
from benchmarks.output import digits, milliseconds, save, table, times_ours
from benchmarks.statistic import seconds_of
from perceiver_fast.adapters.check import tensors_of
from perceiver_fast.insight.work import WorkCounter, total
from perceiver_fast.ops.linear_choice import verdict

ROUNDS = 3
AGREE = 1e-3  # relative difference of outputs that is allowed, in float32
VISION = dict(
    num_latents=512, d_latents=1024, num_blocks=8, num_self_attends_per_block=6, num_self_attention_heads=8,
    num_cross_attention_heads=1, num_labels=1000, image_size=224,
)  # fmt: skip
TEXT = dict(
    num_latents=256, d_latents=1280, d_model=768, num_blocks=1, num_self_attends_per_block=26,
    num_self_attention_heads=8, num_cross_attention_heads=8, qk_channels=256, v_channels=1280,
)  # fmt: skip
FLOW = dict(
    num_latents=2048, d_latents=512, d_model=322, num_blocks=1, num_self_attends_per_block=24,
    num_self_attention_heads=16, num_cross_attention_heads=1, train_size=[368, 496],
)  # fmt: skip
MULTIMODAL = dict(
    num_latents=784, d_latents=512, d_model=704, num_blocks=1, num_self_attends_per_block=8, num_self_attention_heads=8,
    num_cross_attention_heads=1, num_labels=700, num_frames=16, image_size=224, audio_samples_per_frame=1920,
    samples_per_patch=16, output_shape=[1, 16, 224, 224], output_num_channels=512,
)  # fmt: skip


def image(name: str, d_model: int) -> tuple[nn.Module, dict]:
    """An image classifier and one image."""
    import transformers

    config = transformers.PerceiverConfig(d_model=d_model, **VISION)
    return getattr(transformers, f"PerceiverForImageClassification{name}")(config), dict(
        inputs=torch.randn(1, 3, 224, 224)
    )


def masked_lm() -> tuple[nn.Module, dict]:
    """The language model and 2,048 bytes."""
    import transformers

    ids = torch.randint(0, 262, (1, 2048))
    return transformers.PerceiverForMaskedLM(transformers.PerceiverConfig(**TEXT)), dict(inputs=ids)


def optical_flow() -> tuple[nn.Module, dict]:
    """Optical flow of one pair of images, as patches."""
    import transformers

    inputs = torch.randn(1, 2, 27, 368, 496)
    return transformers.PerceiverForOpticalFlow(transformers.PerceiverConfig(**FLOW)), dict(inputs=inputs)


def multimodal(share: int) -> tuple[nn.Module, dict]:
    """Autoencoding of 16 frames and their sound, of which one part of ``share`` is decoded."""
    import transformers

    model = transformers.PerceiverForMultimodalAutoencoding(transformers.PerceiverConfig(**MULTIMODAL))
    modalities = dict(image=torch.randn(1, 16, 3, 224, 224), audio=torch.randn(1, 30720, 1), label=torch.zeros(1, 700))
    points = dict(image=torch.arange(16 * 224 * 224 // share), audio=torch.arange(30720 // 16 // share), label=None)
    return model, dict(inputs=modalities, subsampled_output_points=points)


CASES: dict[str, Callable[[], tuple[nn.Module, dict]]] = {
    "ImageClassificationFourier": lambda: image("Fourier", 261),
    "ImageClassificationFourier, training step": lambda: image("Fourier", 261),
    "ImageClassificationLearned": lambda: image("Learned", 512),
    "ImageClassificationConvProcessing": lambda: image("ConvProcessing", 322),
    "MaskedLM": masked_lm,
    "OpticalFlow": optical_flow,
    "MultimodalAutoencoding, 1/128 decoded": lambda: multimodal(128),
    "MultimodalAutoencoding, all decoded": lambda: multimodal(1),
}
OURS_ALONE = ("MultimodalAutoencoding, all decoded",)  # as it is, it needs some 20 GB


def run(model: nn.Module, inputs: dict, trains: bool) -> list[Tensor]:
    """The outputs; in training the gradients of all parameters."""
    if not trains:
        with torch.inference_mode():
            return list(tensors_of(model(**inputs)))
    model.zero_grad(set_to_none=True)
    model(**inputs).logits.square().mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def difference_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference of all, over the norm of what is expected."""
    square = sum((a - b).double().square().sum().item() for a, b in zip(found, expected, strict=True))
    return (square / sum(b.double().square().sum().item() for b in expected)) ** 0.5


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Medians in turns, after outputs were found to agree.

    Raises:
        RuntimeError: they do not.
    """
    trains = name.endswith("training step")
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model.eval()
    sides = ("ours",) if name in OURS_ALONE else ("theirs", "ours")
    seconds: dict[str, list[float]] = {f"{side}{kind}": [] for side in sides for kind in ("", "_processor")}

    def timed(side: str) -> list[Tensor]:
        (pf.restore if side == "theirs" else pf.accelerate)(model)
        began, results = time.process_time(), []
        seconds[side].append(seconds_of(lambda: results.extend(run(model, inputs, trains))))
        seconds[f"{side}_processor"].append(time.process_time() - began)
        return results

    row: dict[str, Any] = {}
    if name not in OURS_ALONE:
        expected = [t.clone() for t in timed("theirs")]
        row["difference"] = difference_of(timed("ours"), expected)
        if not row["difference"] <= AGREE:
            raise RuntimeError(f"{name}: outputs differ by {row['difference']:.1e}: nothing is reported")
    for _ in range(rounds):
        for side in sides:
            timed(side)
    # The first calls count only where there are no others.
    return row | {kind: statistics.median(times[1:] or times) for kind, times in seconds.items()}


def memory_and_work(name: str, side: str) -> dict[str, Any]:
    """Peak memory of a process that calls one side once; of ours also the counted multiply-adds."""
    trains = name.endswith("training step")
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    model.eval()
    if side == "ours":
        pf.accelerate(model)
    run(model, inputs, trains)
    found = {f"{side}_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if side == "ours" and name not in OURS_ALONE:
        with (
            torch.no_grad() if not trains else torch.enable_grad(),
            WorkCounter() as counter,
            counter.into([]) as operators,
        ):
            model(**inputs)
        found["multiply_adds"] = total(operators).multiply_adds * (3 if trains else 1)
    return found


def in_a_process(arguments: list[str]) -> dict[str, Any]:
    """What this program prints as JSON with these arguments."""
    command = [sys.executable, "-m", f"benchmarks.{Path(__file__).stem}", *arguments, "--child"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    theirs, peak = row.get("theirs"), row.get("theirs_peak")
    return [
        name,
        milliseconds(theirs),
        milliseconds(row["ours"]),
        times_ours(theirs / row["ours"]) if theirs else "-",
        times_ours(row["theirs_processor"] / row["ours_processor"]) if theirs else "-",
        milliseconds(row.get("floor")),
        f"{digits(peak / 2**30)} GiB" if peak else "-",
        f"{digits(row['ours_peak'] / 2**30)} GiB" if "ours_peak" in row else "-",
        f"{row['difference']:.1e}" if "difference" in row else "-",
    ]


def parser() -> argparse.ArgumentParser:
    """All options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks.accelerate", description=__doc__.split("\n")[0])
    top.add_argument("--case", action="append", choices=list(CASES), help="repeat for several (default: all)")
    top.add_argument("--threads", type=int, default=DEFAULT_THREADS, help="torch's threads (default: %(default)s)")
    top.add_argument(
        "--rounds",
        type=int,
        default=ROUNDS,
        help="timed calls of each after the first; 0: that one (default: %(default)s)",
    )
    top.add_argument(
        "--memory", choices=["ours", "theirs", "both", "none"], default="both", help="whose peak is measured"
    )
    top.add_argument(
        "--json",
        type=Path,
        help="where to keep the numbers; with --case those of others stay (default: they are only printed)",
    )
    top.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return top


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.child:
        (name,) = args.case
        found = measure(name, args.rounds) if args.memory == "none" else memory_and_work(name, args.memory)
        print(json.dumps(found))
        return 0
    around = conditions(args.threads)
    speeds = verdict("forward").gflops
    rate = max(speeds.values()) * 1e9 / 2 if speeds else None
    rows: dict[str, dict] = {}
    for name in args.case or list(CASES):
        common = ["--case", name, "--threads", str(args.threads)]
        rows[name] = in_a_process([*common, "--rounds", str(args.rounds), "--memory", "none"])
        sides = {"both": ("ours", "theirs"), "none": ()}.get(args.memory, (args.memory,))
        for side in sides:
            if side == "ours" or name not in OURS_ALONE:
                rows[name] |= in_a_process([*common, "--memory", side])
        if rate and "multiply_adds" in rows[name]:
            rows[name]["floor"] = rows[name]["multiply_adds"] / rate
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    headers = (
        "",
        "as it is",
        "accelerated",
        "",
        "processor time",
        "floor",
        "peak as it is",
        "accelerated",
        "difference",
    )
    title = f"transformers' Perceivers, batch 1, {args.threads} threads, float32"
    Console(width=150).print(table(title, headers, [shown(name, row) for name, row in rows.items()]))
    if args.json:
        if args.case and args.json.exists():  # of other cases
            rows = json.loads(args.json.read_text())["rows"] | rows
        save(args.json, {"conditions": around, "multiply_adds_a_second": rate, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
