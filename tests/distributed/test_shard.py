"""Sharded tokens on two, three and four processes of this machine: the numbers are those of one process."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cases import KINDS
from launch import run
from warm_python import python

import perceiver_fast as pf

EXACT = 1e-12
CASES = 100 if "PERCEIVER_FAST_TEST_ALL_SHARDS" in os.environ else 14


def check(results, bound=EXACT):
    """Every comparison of every rank is within the bound."""
    for rank, found in enumerate(results):
        assert found, f"rank {rank} compared nothing"
        for name, worst, where in found:
            assert worst <= bound, f"rank {rank}: {name}: {worst:.1e} in {where}"


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_random_models(ranks):
    """Outputs and all gradients, in float64: ragged and empty parts, masks of everything, dropout, inverted attention."""
    results = run(ranks, "compare", first=100 * (ranks - 2), count=CASES)
    check(results)
    assert len(results[0]) == CASES


def test_every_kind_of_model_in_float32():
    calls = [("compare", dict(first=7 * i, count=1, kind=kind, single=True)) for i, kind in enumerate(KINDS)]
    for found in zip(*run(3, "several", calls=calls)):
        check(found, 2e-4)  # of the largest element; gradients of a few digits in float32 as one process' are


def test_training_on_a_mesh_of_data_and_tokens():
    """Twenty steps beside DistributedDataParallel and fully_shard, which average over the other dimension."""
    for found in zip(*run(4, "several", calls=[("train", dict(how="ddp")), ("train", dict(how="fully_shard"))])):
        check(found)


def test_compiled():
    check(run(2, "train", how="compile", steps=2))


def test_adapters_hooks_streams_dtensors_and_copies():
    calls = [("adapted", {}), ("adapted", dict(hooked=True)), ("streamed", {}), ("dtensors", {}), ("kept", {})]
    for found in zip(*run(3, "several", calls=calls)):
        check(found)


def test_gradients_add_up_under_autocast_too():
    check(run(2, "accumulate"), 1.0)  # each within its own tolerance


def test_wrong_calls_raise_on_every_rank():
    for rank, errors in enumerate(run(2, "refusals")):
        wanted = [
            "batch: 1 on rank 0, 2 on rank 1",
            "other axes: (7,) on rank 0, (6,) on rank 1",
            "expected data of dtype torch.float64",
            "got none on any",
            "expected mask of shape (2, 70)",
            "training: True on rank 0, False on rank 1",
            "gradients: True on rank 0, False on rank 1",
            "hooks that see keyword arguments",
            "expected a perceiver_fast.layers.Attention",
            "got a sharded one",
            "expected a model of perceiver_fast",
            "expected a DeviceMesh of one dimension",
            "",
        ]
        assert len(errors) == len(wanted)
        for error, text in zip(errors, wanted):
            assert text in error and bool(text) == bool(error), (rank, text, error)


def test_what_one_rank_alone_does_raises_on_every_rank():
    """Where it would send other messages than the others, or draw other random numbers."""
    wanted = [
        "hooks and classes of its cross-attentions", "training of its modules", "parameters", "autocast", "gradients of inputs",
        ("the disk is gone", "another process failed"), "kind", ("", ""), "queries", "other axes", "",
    ]  # fmt: skip
    results = run(2, "one_sided")
    for rank, errors in enumerate(results):
        assert len(errors) == len(wanted)
        for error, text in zip(errors, wanted):
            assert isinstance(text, tuple) or (text in error and bool(text) == bool(error)), (rank, text, error)
    assert "another process failed" in results[0][5] and "the disk is gone" in results[1][5]
    assert "refused its part" in results[0][7] and "7 channels" in results[1][7]


def test_what_a_review_found():
    check(run(3, "reviewed"))


def test_bytes_do_not_depend_on_the_number_of_tokens():
    for found in run(2, "bytes_sent"):
        tokens, messages, sizes = zip(*found)
        assert tokens[-1] == 100 * tokens[0]
        assert len(set(messages)) == len(set(sizes)) == 1 and sizes[0] < 20_000


def test_a_lost_rank_ends_the_others():
    first, _, third = run(3, "lost", dying=(1,), seconds=120)
    assert first != "no error" and third != "no error"


def test_without_a_process_group():
    model = pf.Perceiver(num_freq_bands=1, depth=1, max_freq=2.0, num_latents=2, latent_dim=4)
    with pytest.raises(RuntimeError, match="init_process_group"):
        pf.distributed.shard(model)
    assert pf.distributed.unshard(model) is model


def test_two_nodes_under_torchrun(tmp_path):
    """The example, launched as on two hosts of one process each, which meet over the loopback."""
    example = Path(__file__).parents[2] / "examples" / "distributed.py"
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:29531", "--rdzv-id", "test"]
    root = str(Path(pf.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [*torchrun, *meeting, example, "--quick"]
    with ThreadPoolExecutor(2) as pool:
        nodes = list(pool.map(lambda _: python(*command, env=environment, timeout=240), range(2)))
    texts = [node.stdout + node.stderr for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert any("gradients equal one process'" in text for text in texts), texts


@pytest.fixture(autouse=True)
def plain_allocations(nan_filled_allocations):
    torch.use_deterministic_algorithms(False)  # other processes run the models
    yield
