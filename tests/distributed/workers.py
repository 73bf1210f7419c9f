"""What the processes of a distributed test run: functions of a rank, which return what the test compares."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, cuts, make_case
from torch import Tensor, nn

import perceiver_fast as pf

VERBOSE = "PERCEIVER_FAST_TEST_VERBOSE" in os.environ


def gradients(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}


def run_one(
    case: Case, model: nn.Module, start: int, stop: int, seed: int, drops: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of a call, and gradients of a loss."""
    for t in case.inputs:
        t.grad = None
    torch.manual_seed(drops)
    out = case.call(model, start, stop)
    if case.own_output:
        weight = torch.randn(
            out.shape[0], case.rows, *out.shape[2:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        weight = weight[:, start:stop]
    else:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (out * weight.to(out)).sum().backward()
    return out.detach(), {name: grad.clone() for name, grad in gradients(model, case.inputs).items()}


def difference(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    most = max(float(b.abs().max()), 1e-3) if scale is None else scale
    found = float((a - b).abs().max()) / most
    return found if found == found else float("inf")


def compare(
    rank: int, ranks: int, first: int, count: int, kind: str | None = None, single: bool = False
) -> list[tuple[str, float, str]]:
    """The largest relative difference of outputs and gradients from one process', of some cases."""
    found = []
    for seed in range(first, first + count):
        print(rank, seed, flush=True) if VERBOSE else None
        case = make_case(seed, kind, torch.float32 if single else torch.float64)
        whole = run_one(case, case.model, 0, case.rows, seed, drops=seed)
        model = copy.deepcopy(case.model)
        for p in model.parameters():
            p.grad = None
        pf.distributed.shard(model, shard_queries=case.shard_queries)
        start, stop = cuts(case, ranks, random.Random(seed))[rank]
        out, grads = run_one(case, model, start, stop, seed, drops=seed if rank == 0 else 999 + rank)
        expected = whole[0][:, start:stop] if case.own_output else whole[0]
        worst = [(difference(out, expected), "output")]
        missing = set(grads) ^ set(whole[1])
        if start == stop:  # the gradient of no tokens may be None
            missing = {name for name in missing if not name.startswith("input")}
        if missing:
            worst.append((float("inf"), f"gradients of {missing}"))
        for name in set(grads) & set(whole[1]):
            own = grads[name]
            other = whole[1][name]
            if name.startswith("input"):
                own, other = own[:, start:stop], other[:, start:stop]
            worst.append((difference(own, other), name))
        most = max(worst)
        found.append((case.name, most[0], most[1]))
    return found


def main(rank: int, ranks: int, store: str, results: Any, function: str, arguments: dict) -> None:
    torch.set_num_threads(1)
    import datetime

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60)
    )
    try:
        results.put((rank, None, globals()[function](rank, ranks, **arguments)))
    except BaseException as error:  # the test says which
        import traceback

        results.put((rank, f"{error}\n{traceback.format_exc()}", None))
    finally:
        dist.destroy_process_group()
