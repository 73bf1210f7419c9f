"""FSDP, old and new, on any module, on one rank and on two: outputs and gradients are those of the model unsharded."""

from pathlib import Path

import pytest
from warm_python import python

WORKER = Path(__file__).parents[1] / "contract_sharding.py"
UNITS = ("PerceiverBlock", "FeedForward", "PreNorm", "Attention", "Linear", "LayerNorm", "GRUGating")


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_module_may_be_a_unit(ranks, tmp_path):
    units = UNITS if ranks == 1 else UNITS[:3]
    process = python(WORKER, ranks, tmp_path / "meeting", *units, timeout=300, imports=["torch._dynamo"])
    done = sorted(f"ok {kind} {unit} {rank}" for kind in ("fsdp2", "fsdp1") for unit in units for rank in range(ranks))
    assert process.returncode == 0 and sorted(process.stdout.splitlines()) == done, process.stderr[-3000:]
