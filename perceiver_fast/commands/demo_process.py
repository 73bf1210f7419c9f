"""Time and peak memory of one model in a fresh process, so that nothing ran before it and nothing else counts.

``python -m perceiver_fast.commands.demo_process FOLDER`` is that process; :func:`measure` starts it. Both speak through
files of a folder, ``task.pt`` and ``result.pt``. Lines on standard output say how far it is.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import perceiver_fast as pf
from perceiver_fast.insight.console import Report
from perceiver_fast.insight.environment import forget_peak, resident_bytes
from perceiver_fast.insight.geometries import Geometry
from perceiver_fast.insight.peer import peer_model

SEED = 0
FAST, ORIGINAL = "perceiver-fast", "perceiver-pytorch"


class MeasureError(RuntimeError):
    """The measuring process failed, or was not started; the message says why."""


def original_bytes(geometry: Geometry) -> int:
    """Memory that one inference forward of perceiver-pytorch 0.11.0 adds, batch 1, float32: what it holds at once.

    The peak is in a cross-attention, while these tensors of M rows are alive:
    positions (A columns), their encoding, the tokens, the normalised tokens, keys and values, and the logits of all
    heads twice: as multiplied and as scaled, then as scaled and as probabilities. What the latents need is left out.

    Example:
        >>> from dataclasses import replace
        >>> from perceiver_fast.insight.geometries import GEOMETRIES
        >>> original_bytes(replace(GEOMETRIES["readme"], sizes=(427, 640)))
        793605120
    """
    encoding = geometry.token_channels - geometry.channels
    keys_values_and_logits = 2 * geometry.heads * (geometry.dim_head + geometry.queries)
    columns = len(geometry.sizes) + encoding + 2 * geometry.token_channels + keys_values_and_logits
    return geometry.tokens * columns * torch.float32.itemsize


def _check_memory(geometry: Geometry) -> None:
    """perceiver-pytorch's process holds the weights twice while it loads them, and later once beside its tensors."""
    import psutil

    with torch.device("meta"):
        weights = sum(tensor.nbytes for tensor in geometry.build().state_dict().values())
    process = psutil.Process().memory_info().rss  # Python with PyTorch loaded, as this one
    needed = process + weights + max(weights, original_bytes(geometry))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MeasureError(f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB free: not run")


def build(model: str, geometry: Geometry) -> nn.Module:
    """FAST's or ORIGINAL's model of a geometry, with the same weights: those of ours for SEED."""
    torch.manual_seed(SEED)
    fast = geometry.build().eval()
    return fast if model == FAST else peer_model(geometry, fast.state_dict()).eval()


def measure(model: str, geometry: Geometry, data: Tensor, repeats: int, threads: int, say: Report) -> dict:
    """Time a model's forward in a fresh process, after a warm-up.

    Args:
        model: FAST or ORIGINAL.
        geometry: what is built.
        data: the model's input.
        repeats: timed forwards.
        threads: of the CPU.
        say: called with how far it is.

    Returns:
        dict: ``seconds`` (a list, one a repeat), ``peak_bytes_added`` (None where the system cannot tell), ``output``, a
        Tensor, and of FAST ``paths``, how many layers run what, by :func:`perceiver_fast.explain`.

    Raises:
        MeasureError: ORIGINAL needs more memory than is free; the process failed, or was killed.
    """
    if model == ORIGINAL:
        _check_memory(geometry)
    with TemporaryDirectory() as folder:
        torch.save((model, geometry, data, repeats, threads), Path(folder) / "task.pt")
        command, line = [sys.executable, "-m", __name__, folder], ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or ():
                say(line.strip())
        code = process.returncode
        if code < 0:
            name = signal.Signals(-code).name
            raise MeasureError(f"killed by {name}" + (", most likely out of memory" if name == "SIGKILL" else ""))
        if code:
            raise MeasureError(f"failed with exit code {code}: {line.strip()}")
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def _start_of_peak() -> int | None:
    """Forget the peak so far and return the resident memory now; None where the system cannot do that."""
    try:
        # Free memory that malloc keeps would be used again without being counted.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
        forget_peak()
        return resident_bytes()
    except OSError:
        return None


def main(folder: Path) -> None:
    """Run the task of ``folder``; this process does nothing else."""
    print("loading", flush=True)
    name, geometry, data, repeats, threads = torch.load(folder / "task.pt", weights_only=False)  # measure's own
    torch.set_num_threads(threads)
    model, seconds = build(name, geometry), []
    before = _start_of_peak()
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            print(f"repeat {repeat} of {repeats}" if repeat else "warm-up", flush=True)
            start = time.perf_counter()
            output = model(data)
            seconds.append(time.perf_counter() - start)
    peak = None if before is None else resident_bytes("VmHWM") - before
    result = {"output": output.clone(), "seconds": seconds[1:], "peak_bytes_added": peak}
    if name == FAST:
        layers = pf.explain(model, data).layers
        attention = [layer.choice for layer in layers if layer.path or layer.choice.op == "self_attention"]
        result["paths"] = dict(Counter(f"{choice.op} on {choice.backend}" for choice in attention))
    torch.save(result, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
