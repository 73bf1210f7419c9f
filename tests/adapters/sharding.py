"""One rank of sharded accelerated models, equal to the models as they are. Run by tests/adapters/test_sharding.py.

Usage: python sharding.py RANK RANKS FILE [UNIT ...]
"""

import copy
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.perceivers import build  # noqa: E402
from contract_sharding import fully_sharded, gradients, wrapped  # noqa: E402

import perceiver_fast as pf  # noqa: E402
from perceiver_fast.adapters.check import tensors_of  # noqa: E402

MODELS = ("fourier", "conv", "flow", "masked lm", "multimodal")
FAILS_AS_IT_IS = {
    ("flow", "Linear")
}  # fully_shard of transformers' final layer: its backward, without this package too
SHARD = {"fsdp2": fully_sharded, "fsdp1": wrapped}


def loss_of(output):
    return sum(t.square().mean() for t in tensors_of(output))


def check(name, unit, kind, first):
    model, inputs = build(name, seed=1)  # every rank the same input: a mean over ranks is one rank's
    sharded = copy.deepcopy(model)
    if first == "accelerated":
        assert pf.accelerate(sharded)
    sharded = SHARD[kind](sharded, unit)
    if first == "sharded":
        assert pf.accelerate(sharded)
    expected, actual = loss_of(model(**inputs)), loss_of(sharded(**inputs))
    where = name, unit, kind, f"{first} first"
    assert torch.allclose(actual, expected, rtol=1e-12), (*where, actual, expected)
    expected.backward()
    actual.backward()
    found = gradients(sharded, kind)
    for key, p in model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[key], p.grad, rtol=1e-9, atol=1e-13), (*where, key, found[key] - p.grad)


def main(rank, ranks, file, *units):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(ranks))
    for unit in units:
        for kind in SHARD:
            for first in ("accelerated", "sharded"):
                for name in MODELS:
                    if (name, unit) in FAILS_AS_IT_IS:
                        continue
                    check(name, unit, kind, first)
                print("ok", unit, kind, first, flush=True)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for each other at exit


if __name__ == "__main__":
    main(*sys.argv[1:])
