"""The ranks of sharded accelerated models, equal to the models as they are. Run by tests/adapters/test_sharding.py.

A model, a unit and a kind come with one of both orders; any two of the four come with each other. All orders of all run
with PERCEIVER_FAST_TEST_ALL_SHARDS=1.

Usage: python sharding.py RANKS FILE [UNIT ...]
"""

import copy
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapters.perceivers import build  # noqa: E402
from contract_sharding import fully_sharded, gradients, run_ranks, say, wrapped  # noqa: E402

import perceiver_fast as pf  # noqa: E402
from perceiver_fast.adapters.check import tensors_of  # noqa: E402

MODELS = ("fourier", "conv", "flow", "masked lm", "multimodal")
FAILS_AS_IT_IS = {
    ("flow", "Linear")
}  # fully_shard of transformers' final layer: its backward, without this package too
ALL = "PERCEIVER_FAST_TEST_ALL_SHARDS" in os.environ
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


def main(ranks, file, *units):
    def run(rank):
        for u, unit in enumerate(units):
            for k, kind in enumerate(SHARD):
                for f, first in enumerate(("accelerated", "sharded")):
                    for n, name in enumerate(MODELS):
                        if (name, unit) not in FAILS_AS_IT_IS and (ALL or (u + k + f + n) % 2 == 0):
                            check(name, unit, kind, first)
                    say("ok", unit, kind, first, rank)

    return run_ranks(run, int(ranks), file)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
