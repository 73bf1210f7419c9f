"""Runs a function of workers.py in several processes, forked from one that has imported what takes seconds.

Their environment is that of the first call.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from queue import Empty
from time import monotonic
from typing import Any

import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
import workers  # noqa: E402

IMPORTED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]


def run(ranks: int, function: str, dying: tuple[int, ...] = (), seconds: float = 240, **arguments: Any) -> list[Any]:
    """What the function returns on every rank; ``dying`` are the ranks that are not waited for.

    Raises:
        AssertionError: it raised on some rank, or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        processes = [
            context.Process(target=workers.main, args=(rank, ranks, store, results, function, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        found: dict[int, Any] = {}
        end = monotonic() + seconds
        try:
            while len(found) < ranks - len(dying):
                rank, error, value = results.get(timeout=max(0.1, end - monotonic()))
                assert error is None, f"rank {rank} of {ranks}: {error}"
                found[rank] = value
        except Empty:
            raise AssertionError(f"{function} on {ranks} ranks took more than {seconds} s") from None
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    return [found.get(rank) for rank in range(ranks)]
