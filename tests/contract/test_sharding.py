"""FSDP, old and new, on any module, on one rank and on two: outputs and gradients are those of the model unsharded."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "contract_sharding.py"
UNITS = ("PerceiverBlock", "FeedForward", "PreNorm", "Attention", "Linear", "LayerNorm", "GRUGating")


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_module_may_be_a_unit(ranks, tmp_path):
    units = UNITS if ranks == 1 else UNITS[:3]
    command = [str(ranks), str(tmp_path / "meeting"), *units]
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
        done = [f"ok {kind} {unit}" for kind in ("fsdp2", "fsdp1") for unit in units]
        assert process.returncode == 0 and out.splitlines() == done, err[-3000:]
