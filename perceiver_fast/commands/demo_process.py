"""Time and peak memory of one model in a fresh process, so that nothing ran before it and nothing else counts.

``python -m perceiver_fast.commands.demo_process LIBRARY FOLDER`` is that process; :func:`run` starts it. Both speak through
files of a folder: ``task.pt`` (model arguments, weights, input) goes in, ``LIBRARY.pt`` (output) and ``LIBRARY.json``
(time and memory) come out. Lines on standard output say how far it is.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

Report = Callable[[str], object]


class MeasureError(RuntimeError):
    """The measuring process failed; the message says how."""


def original_bytes(arguments: dict, sizes: Sequence[int]) -> int:
    """Memory that one inference forward of perceiver-pytorch 0.11.0 adds, batch 1, float32: what it holds at once.

    The peak is in a cross-attention, while these tensors of M rows are alive:
    positions (A columns), their encoding, the tokens, the normalised tokens, keys and values, and the logits of all
    heads twice: as multiplied and as scaled, then as scaled and as probabilities. What the latents need is left out.

    Args:
        arguments: of ``perceiver_pytorch.Perceiver``.
        sizes: the grid's sizes n_1 .. n_A.

    Example:
        >>> arguments = dict(num_freq_bands=6, input_channels=3, num_latents=256)
        >>> original_bytes(arguments, (427, 640))
        793605120
    """
    axes, heads = len(sizes), arguments.get("cross_heads", 1)
    encoding = axes * (2 * arguments["num_freq_bands"] + 1)
    channels = arguments["input_channels"] + encoding
    keys_and_values = 2 * heads * arguments.get("cross_dim_head", 64)
    logits = 2 * heads * arguments["num_latents"]
    columns = axes + encoding + 2 * channels + keys_and_values + logits
    return math.prod(sizes) * columns * torch.float32.itemsize


def original_needs(arguments: dict, sizes: Sequence[int], weight_bytes: int) -> int:
    """Memory of a process that runs perceiver-pytorch: it holds the weights twice while it loads them, later once."""
    import psutil

    process = psutil.Process().memory_info().rss  # Python with PyTorch loaded, as this one
    return process + weight_bytes + max(weight_bytes, original_bytes(arguments, sizes))


def available_memory() -> int:
    """Bytes that can be used without swapping."""
    import psutil

    return psutil.virtual_memory().available


def write_task(
    folder: Path, arguments: dict, weights: dict[str, Tensor], data: Tensor, repeats: int, threads: int
) -> None:
    """Leave in ``folder`` what :func:`run` runs."""
    task = {"arguments": arguments, "weights": weights, "data": data, "repeats": repeats, "threads": threads}
    torch.save(task, folder / "task.pt")


def run(library: str, folder: Path, report: Report) -> dict:
    """Run the task of ``folder`` with ``LIBRARY.Perceiver`` in a fresh process.

    Args:
        library: name of a module that has a Perceiver.
        folder: where :func:`write_task` wrote.
        report: called with a line of progress.

    Returns:
        dict: ``seconds`` (a list, one a repeat), ``peak_bytes_added`` (None where the system cannot tell), ``paths``
        (of a perceiver_fast model's attention, by :func:`perceiver_fast.explain`) and ``output``, a Tensor.

    Raises:
        MeasureError: the process failed or was killed.
    """
    command = [sys.executable, "-m", "perceiver_fast.commands.demo_process", library, str(folder)]
    with (
        open(folder / "errors.txt", "w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout:
            report(line.strip())
        code = process.wait()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    if code < 0:
        name = signal.Signals(-code).name
        raise MeasureError(f"killed by {name}" + (", most likely out of memory" if name == "SIGKILL" else ""))
    if code:
        raise MeasureError(f"failed with exit code {code}: {last}")
    result = json.loads((folder / f"{library}.json").read_text())
    return result | {"output": torch.load(folder / f"{library}.pt", weights_only=True)}


def _resident(field: str) -> int:
    """VmRSS or VmHWM, the resident memory of this process and its peak, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _start_of_peak() -> int | None:
    """Forget the peak so far and return the resident memory now; None where the system cannot do that."""
    try:
        # Free memory that malloc keeps would be used again without being counted.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _forwards(model: nn.Module, data: Tensor, repeats: int, report: Report) -> tuple[Tensor, list[float], int | None]:
    seconds, before = [], _start_of_peak()
    with torch.inference_mode():
        report("warm-up")
        output = model(data)
        for i in range(repeats):
            report(f"repeat {i + 1} of {repeats}")
            start = time.perf_counter()
            output = model(data)
            seconds.append(time.perf_counter() - start)
    return output, seconds, None if before is None else _resident("VmHWM") - before


def main(library: str, folder: Path) -> None:
    """Run the task of ``folder``; this process does nothing else."""
    print("loading", flush=True)
    task = torch.load(folder / "task.pt", weights_only=True)
    torch.set_num_threads(task["threads"])
    model = importlib.import_module(library).Perceiver(**task["arguments"]).eval()
    model.load_state_dict(task.pop("weights"))  # strict, and freed at once
    output, seconds, peak = _forwards(model, task["data"], task["repeats"], lambda line: print(line, flush=True))
    result = {"seconds": seconds, "peak_bytes_added": peak}
    if library == "perceiver_fast":
        layers = importlib.import_module(library).explain(model, task["data"]).layers
        attention = [layer.choice for layer in layers if layer.path or layer.choice.op == "self_attention"]
        result["paths"] = [f"{choice.op} on {choice.backend}" for choice in attention]
    torch.save(output.clone(), folder / f"{library}.pt")
    (folder / f"{library}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
