"""FSDP, old and new, of accelerated models on two ranks, accelerated before it or after it: the same as the model as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: sharded accelerated models were NOT tested")

UNITS = "PerceiverLayer", "PerceiverSelfAttention", "Linear"


def test_sharded_models_stay_right(tmp_path):
    worker = Path(__file__).with_name("sharding.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(rank), "2", str(tmp_path / "meeting"), *UNITS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    done = [
        f"ok {u} {kind} {first}" for u in UNITS for kind in ("fsdp2", "fsdp1") for first in ("accelerated", "sharded")
    ]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and out.splitlines() == done, err[-3000:]
