"""FSDP, old and new, of accelerated models on two ranks, accelerated before it or after it: the same as the model as it is."""

from pathlib import Path

import pytest
from warm_python import python

pytest.importorskip("transformers", reason="transformers is not installed: sharded accelerated models were NOT tested")

UNITS = "PerceiverLayer", "PerceiverSelfAttention", "Linear"


def test_sharded_models_stay_right(tmp_path):
    worker = Path(__file__).with_name("sharding.py")
    process = python(worker, 2, tmp_path / "meeting", *UNITS, timeout=300, imports=["torch._dynamo"])
    orders = [(u, kind, first) for u in UNITS for kind in ("fsdp2", "fsdp1") for first in ("accelerated", "sharded")]
    done = sorted(f"ok {' '.join(order)} {rank}" for order in orders for rank in range(2))
    assert process.returncode == 0 and sorted(process.stdout.splitlines()) == done, process.stderr[-3000:]
