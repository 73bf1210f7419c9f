"""What the tuner runs on a GPU: calls with candidates, checked against the shipped configuration, and the choice."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import triton

from perceiver_fast.kernels import tune_candidates
from perceiver_fast.kernels.configs import config
from perceiver_fast.kernels.tune_candidates import Call

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tune_candidates, "ROUNDS", 1)
    for name, value in dict(BATCH=1, LATENTS=17, IMAGE=(2, 17)).items():
        monkeypatch.setattr(tune_candidates, name, value)


def stub(monkeypatch, *times, runs=1):
    """Time by these, in turns; what is to be timed runs so often."""
    turns = itertools.cycle(times)

    def do_bench(run, **options):
        for _ in range(runs):
            run()
        return next(turns)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("grid_attention_forward[fma]", Call("grid_attention", F32, 3)),
        ("grid_attention_forward[tf32, wide]", Call("grid_attention", F16, 8)),
        ("grid_attention_backward[bf16]", Call("grid_attention", BF16, 3)),
        ("grid_attention_token_grads[fma]", Call("grid_attention", F32, 3)),
        ("cross_attention_forward[half, 64]", Call("cross_attention", BF16, 64)),
        ("cross_attention_dq[fp32]", Call("cross_attention", F32, 64, True)),
        ("cross_attention_dkv[fp32]", Call("cross_attention", F32, 128)),
        ("grid_query_attention_forward[half]", Call("grid_query_attention", BF16, 3, True, 64)),
        ("grid_query_attention_axes[few]", Call("grid_query_attention", F32, 0, True, 1)),
    ],
)
def test_candidates_run_and_the_faster_is_chosen(name, call, device, monkeypatch):
    shipped = config(name, 90)
    other = replace(shipped, queries=16, tokens=16)
    stub(monkeypatch, 2.0, 1.0)
    chosen, gain, log = tune_candidates.choose(name, [call], [shipped, other], 90, device, math.inf)
    assert chosen is other and gain == pytest.approx(1.0)
    assert [list(entry["microseconds"].values()) for entry in log["all"]] == [[2000.0], [1000.0]]


def test_a_small_gain_changes_nothing(device, monkeypatch):
    name, call = "grid_attention_forward[fma]", Call("grid_attention", F32, 3)
    shipped = config(name, 90)
    stub(monkeypatch, 1.01, 1.0, runs=2)
    chosen, gain, _ = tune_candidates.choose(
        name, [call], [shipped, replace(shipped, queries=16)], 90, device, math.inf
    )
    assert chosen is shipped and gain == pytest.approx(0.01)


def test_a_wrong_candidate_is_left_out(device, monkeypatch):
    name, call = "grid_attention_forward[fma]", Call("grid_attention", F32, 3)
    shipped = config(name, 90)
    other = replace(shipped, queries=16)
    stub(monkeypatch, 2.0, 1.0)
    monkeypatch.setattr(tune_candidates, "wrong", lambda results, right, tolerance: next(verdicts))
    verdicts = itertools.chain([None, "wrong: it is"], itertools.repeat(None))
    chosen, _, log = tune_candidates.choose(name, [call], [shipped, other], 90, device, math.inf)
    assert chosen is shipped and log["all"][1]["microseconds"][str(call)] == "wrong: it is"


def test_errors_are_of_the_norm_and_not_a_number_is_wrong():
    right = [torch.ones(4), torch.ones(2, dtype=torch.float64)]
    assert tune_candidates.wrong([right[0] * 1.00001, right[1]], right, 1e-4) is None
    assert "1.0e-02" in tune_candidates.wrong([right[0] * 1.01, right[1]], right, 1e-4)
    assert tune_candidates.wrong([right[0], right[1] * math.nan], right, 1e-4)


def test_time_runs_out(device):
    name, call = "grid_attention_forward[fma]", Call("grid_attention", F32, 3)
    with pytest.raises(tune_candidates.OutOfTime):
        tune_candidates.choose(name, [call], [config(name, 90)], 90, device, -math.inf)
