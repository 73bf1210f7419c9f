"""The ranks of a sharded run: every unit of every model, equal to the model as it was. Run by tests/contract/test_sharding.py.

Usage: python contract_sharding.py RANKS FILE [UNIT ...]
"""

import copy
import os
import sys
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from contract_cases import inputs, pair
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

MODELS = ("perceiver", "io", "gated", "mixed latents", "experimental")


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fully_sharded(model, unit):
    for module in reversed([m for m in model.modules() if type(m).__name__ == unit and m is not model]):
        fully_shard(module)
    return fully_shard(model)


def wrapped(model, unit):
    """FSDP1 around every module of a kind, and around the whole."""
    device = torch.device("cpu")

    def wrap(parent):
        for name, child in list(parent.named_children()):
            wrap(child)
            if type(child).__name__ == unit:
                setattr(parent, name, FullyShardedDataParallel(child, device_id=device, use_orig_params=True))

    wrap(model)
    return FullyShardedDataParallel(model, device_id=device, use_orig_params=True)


def gradients(model, kind):
    if kind == "fsdp2":
        return {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    found = {}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[name.replace("_fsdp_wrapped_module.", "")] = p.grad.clone()
    return found


def check(name, unit, kind):
    _, plain = pair(name, dtype=torch.float64)
    call = inputs(name, torch.float64, seed=1 + dist.get_rank())
    sharded = {"fsdp1": wrapped, "fsdp2": fully_sharded}[kind](copy.deepcopy(plain), unit)
    expected, actual = plain(**call), sharded(**call)
    assert torch.allclose(actual, expected, atol=1e-12), (name, unit, "output", (actual - expected).abs().max())
    for out in (expected, actual):
        out.square().mean().backward()
    found = gradients(sharded, kind)
    for key, p in plain.named_parameters():
        if p.grad is None:
            continue
        dist.all_reduce(p.grad)
        mean = p.grad / dist.get_world_size()
        assert torch.allclose(found[key], mean, atol=1e-12), (name, unit, key, (found[key] - mean).abs().max())


def say(*words):
    """A line in one piece: the ranks write to one file."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def run_ranks(run, ranks, file):
    """``run(rank)`` in a fork for every rank, in a group that meets at a file: what is imported is imported once."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            meeting = dict(init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=timedelta(seconds=100))
            try:
                dist.init_process_group("gloo", **meeting)
                run(rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)  # gloo's threads may wait for each other at exit
        processes.append(process)
    return max(os.waitpid(process, 0)[1] for process in processes) and 1


def main(ranks, file, *units):
    def run(rank):
        for kind in ("fsdp2", "fsdp1"):
            for unit in units:
                for name in MODELS:
                    check(name, unit, kind)
                say("ok", kind, unit, rank)

    return run_ranks(run, int(ranks), file)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
