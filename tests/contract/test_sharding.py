"""FSDP, old and new, on any module, on one rank and on two: outputs and gradients are those of the model unsharded."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "contract_sharding.py"
UNITS = ("PerceiverBlock", "FeedForward", "PreNorm", "Attention", "Linear", "LayerNorm", "GRUGating")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1"])
def test_any_module_may_be_a_unit(kind, ranks, tmp_path):
    units = UNITS if ranks == 1 else UNITS[:3]
    command = [str(ranks), str(tmp_path / "meeting"), kind, *units]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out.split() == [w for unit in units for w in ("ok", unit)], err[-3000:]
