"""grid_attention with its CUDA sweeps against the reference in float64: on a GPU, or emulated between interpreted kernels."""

import importlib

import pytest
import torch
from grid_attention_cases import CASES, FLOOR, errors
from grid_attention_emulation import build, compiler, operators
from support import grid_inputs

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.ops.grid_attention import CUDA_FEATURES, GRID_ATTENTION, GridAttentionCall, grid_attention_unchecked
from perceiver_fast.ops.trial import Outcome, held

HALF = torch.bfloat16, torch.float16
FITTING = [case for case in CASES if len(case[3]) == 2 and case[2] <= 4]
FITTING += [(2, 130, 1, (24, 40), True), (1, 5, 2, (17, 33), True), (3, 2, 3, (1, 100), False)]


@pytest.fixture(scope="module")
def library(device, tmp_path_factory):
    if device.type == "cuda":
        if extension.cuda_error is not None:
            pytest.skip(f"{extension.cuda_error}: the CUDA kernels were NOT tested")
        yield None
        return
    if compiler() is None:
        pytest.skip("no g++ or clang++ to run the CUDA kernels on the host with")
    emulated = torch.library.Library("perceiver_fast", "FRAGMENT")
    for schema, function in operators(build(tmp_path_factory.mktemp("emulation"))).items():
        emulated.define(schema)
        emulated.impl(schema.partition("(")[0], function, "CPU")
    yield emulated
    emulated._destroy()


@pytest.fixture(autouse=True)
def sweeps(library, monkeypatch):
    if library is not None:
        op = importlib.import_module("perceiver_fast.ops.grid_attention")
        reasons = op.kernel_reasons
        monkeypatch.setattr(
            op, "kernel_reasons", lambda e, kind, *rest: [] if kind == "cuda" else reasons(e, kind, *rest)
        )


def choice(device, **options):
    facts = dict(dtype=torch.float32, device=device, sizes=(8, 8), features=3, half=torch.bfloat16) | options
    return GRID_ATTENTION.choose(GridAttentionCall(**facts))


def test_only_calls_that_they_take_are_theirs(device):
    assert choice(device).backend == choice(device, half=torch.float16).backend == "cuda"
    for options, why in (
        (dict(half=None), "bfloat16 or float16, not torch.float32"),
        (dict(sizes=(2, 8, 8)), "two axes, not 3"),
        (dict(features=5), "4 raw channels in torch.bfloat16, not 5"),
        (dict(features=4, half=torch.float16), "3 raw channels in torch.float16, not 4"),
        (dict(dropout=0.1), "drops no weights"),
    ):
        found = choice(device, **options)
        assert found.backend == "triton" and why in str(found.rejected["cuda"]), options


@pytest.mark.parametrize("dtype, case", [(t, c) for t in HALF for c in FITTING if c[2] <= CUDA_FEATURES[t]], ids=str)
def test_error_is_that_of_plain_pytorch(device, dtype, case):
    for name, (kernel, plain) in errors(device, dtype, case, backend="cuda").items():
        assert kernel <= 2 * plain + FLOOR[dtype], name


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("magnitude, shift", [(8.0, 0.0), (1e3, 0.0), (1e4, 0.0), (1.0, 600.0), (1.0, -600.0)])
def test_extreme_logits(device, dtype, magnitude, shift):
    for name, (kernel, plain) in errors(device, dtype, CASES[4], magnitude, shift=shift, backend="cuda").items():
        if dtype == torch.float16 and magnitude == 1e4:
            # Plain PyTorch overflows. Logits are off by 2^-16 of what they are, which tokens' gradients do not share.
            assert kernel <= 2e-2 or name in ("dfeat", "dscale"), name
        else:
            assert kernel <= 2 * plain + 2e-2, name


def test_they_prove_themselves(device):
    assert held(GRID_ATTENTION.trial, "cuda", device) == Outcome("")


@pytest.mark.parametrize("half", HALF)
def test_one_set_of_queries_for_the_batch(device, half):
    q, feat, scale, _ = (t if t is None else t.to(device) for t in grid_inputs(3, 6, 3, (5, 34), torch.float32))
    shared = q[:1].expand(3, -1, -1)
    with pf.use_backend("cuda"):
        mine, theirs = (grid_attention_unchecked(t, feat, scale, half=half)[0] for t in (shared, shared.contiguous()))
    assert torch.equal(mine, theirs)
