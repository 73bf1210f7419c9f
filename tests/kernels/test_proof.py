"""Kernels broken on purpose: PyTorch takes over with one warning, and results are right."""

import importlib
import warnings

import pytest
import torch

from perceiver_fast import reference
from perceiver_fast.kernels.launch import Launch
from perceiver_fast.ops import pointwise, proof
from perceiver_fast.ops.declaration import OPS
from perceiver_fast.ops.geglu import geglu
from perceiver_fast.ops.pointwise import PointwiseCall
from perceiver_fast.ops.trial import Outcome, held

TRIED = [name for name, op in OPS.items() if op.trial and any(backend.name == "triton" for backend in op.backends)]


@pytest.mark.parametrize("name", TRIED)
def test_kernels_hold(name, device):
    assert held(OPS[name].trial, "triton", device) == Outcome("")


@pytest.fixture
def unknown(device, monkeypatch, tmp_path):
    """The device is of an architecture that nothing is known of."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "unproven", lambda op, device: "sm_90")
    for name, value in (("_doubts", {}), ("_warned", False)):
        monkeypatch.setattr(proof, name, value)
    monkeypatch.setattr(pointwise, "_answers", {})
    return device


def run(device):
    """GEGLU and its gradient, and what they should be."""
    h = torch.randn(5, 12, device=device, requires_grad=True)
    mine, true = geglu(h), reference.geglu(h, None)
    grads = [torch.autograd.grad(u.square().sum(), h)[0] for u in (mine, true)]
    assert torch.allclose(mine, true, atol=1e-5) and torch.allclose(*grads, atol=1e-4)


def reasons(device):
    return OPS["geglu"].choose(PointwiseCall(torch.float32, device)).rejected.get("triton")


def test_kernels_that_hold_run(unknown):
    run(unknown)
    assert reasons(unknown) is None


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_wrong_numbers(where, unknown, monkeypatch):
    module = importlib.import_module("perceiver_fast.kernels.geglu")
    right = getattr(module, where)

    def wrong(*arguments):
        found = right(*arguments)
        for tensor in [found] if where == "forward" else found[1:2]:
            tensor *= 1.01
        return found

    monkeypatch.setattr(module, where, wrong)
    with pytest.warns(RuntimeWarning, match="triton kernels of geglu .* is off by"):
        run(unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run(unknown)
    assert "off by" in reasons(unknown)[0]


def test_a_launch_that_raises(unknown, monkeypatch):
    def refused(launch):
        raise KeyError(f"Keyword argument per_split was specified but unrecognised by {launch.kernel.__name__}")

    monkeypatch.setattr(Launch, "run", refused)
    with pytest.warns(RuntimeWarning, match="geglu .* KeyError: .*per_split"):
        run(unknown)
    assert "per_split" in reasons(unknown)[0] and not list(proof.remembered.folder().parent.iterdir())
