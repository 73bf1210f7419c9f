"""CUDA graphs. Without a GPU a replay runs the model again, so that all but the recording itself is tested."""

import importlib

import pytest
import torch
from support import relative_error
from torch import nn

import perceiver_fast as pf

graph_module = importlib.import_module("perceiver_fast.graph")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU: CUDA graphs did NOT run")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x, mask=None, factor=1.0):
        self.calls += 1
        assert not torch.is_grad_enabled() and not torch.is_autocast_cache_enabled()
        out = self.linear(x) * factor
        return {"out": out if mask is None else out * mask.unsqueeze(-1), "name": "linear"}


@pytest.fixture
def recorded(monkeypatch):
    """A graph of Model whose replay runs the model into the recorded output."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())

    def capture(run):
        output = run()

        def replay():
            with torch.inference_mode():  # a graph writes to any memory
                output["out"].copy_(run()["out"])

        return replay, output

    monkeypatch.setattr(graph_module, "_capture", capture)
    model = Model()

    def make(*args, copy=True, **kwargs):
        return model, graph_module.Graph(model, args, kwargs, copy)

    return make


def test_inputs_reach_the_recording(recorded):
    example = torch.zeros(2, 4)
    model, graph = recorded(example, mask=torch.ones(2))
    for _ in range(3):
        x, mask = torch.randn(2, 4), torch.rand(2)
        got = graph(x, mask=mask)
        assert torch.equal(got["out"], model.linear(x) * mask.unsqueeze(-1)) and got["name"] == "linear"
    assert not example.any() and not got["out"].requires_grad


def test_inputs_that_learn_leave_no_trace(recorded):
    model, graph = recorded(torch.zeros(2, 4))
    x = torch.randn(2, 4, requires_grad=True)
    for _ in range(2):
        assert not graph(x * 2)["out"].requires_grad
    assert not any(t.requires_grad for t in graph._inputs)


def test_made_in_inference_mode_and_called_outside(recorded):
    with torch.inference_mode():
        model, graph = recorded(torch.zeros(2, 4))
    x = torch.randn(2, 4)
    assert torch.equal(graph(x)["out"], model.linear(x))


def test_outputs_are_copies_unless_asked(recorded):
    _, graph = recorded(torch.zeros(2, 4))
    first = graph(torch.ones(2, 4))["out"]
    kept = first.clone()
    graph(torch.full((2, 4), 5.0))
    assert torch.equal(first, kept)
    _, graph = recorded(torch.zeros(2, 4), copy=False)
    first = graph(torch.ones(2, 4))["out"]
    assert first is graph(torch.full((2, 4), 5.0))["out"]


def test_values_change_freely_and_moves_are_recorded_again(recorded):
    model, graph = recorded(torch.zeros(2, 4))
    x, record, records = torch.randn(2, 4), graph._record, []
    graph._record = lambda: (records.append(1), record())
    with torch.no_grad():
        model.linear.weight.mul_(2)
    assert torch.equal(graph(x)["out"], model.linear(x)) and not records
    model.linear.weight = nn.Parameter(torch.randn(3, 4))
    assert torch.equal(graph(x)["out"], model.linear(x)) and len(records) == 1
    model.eval()
    assert torch.equal(graph(x)["out"], model.linear(x)) and len(records) == 2
    graph(x)
    assert len(records) == 2


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        ((torch.zeros(3, 4),), {}, ValueError, r"expected a tensor like the example's, \(\(2, 4\)"),
        ((torch.zeros(2, 4).double(),), {}, ValueError, "torch.float64"),
        ((1.0,), {}, ValueError, "got float"),
        ((), {}, TypeError, "arguments as in the example"),
        ((torch.zeros(2, 4),), {"mask": torch.ones(2)}, TypeError, "make another graph"),
    ],
)
def test_other_inputs_are_refused(recorded, args, kwargs, error, words):
    _, graph = recorded(torch.zeros(2, 4))
    with pytest.raises(error, match=words):
        graph(*args, **kwargs)


def test_other_constants_are_refused(recorded):
    _, graph = recorded(torch.zeros(2, 4), factor=2.0)
    with pytest.raises(ValueError, match="expected 2.0, as in the example, got 3.0"):
        graph(torch.zeros(2, 4), factor=3.0)


def test_needs_cuda():
    model = Model()
    with pytest.raises(ValueError, match="expected the model and the example on one CUDA device, got cpu"):
        pf.graph(model, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="got none"):
        pf.graph(model)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    torch.manual_seed(0)
    model = pf.Perceiver(num_freq_bands=6, depth=2, max_freq=10.0, num_latents=64, latent_dim=128, num_classes=10)
    model = model.cuda().eval().to(dtype)
    graph = pf.graph(model, torch.zeros(2, 40, 30, 3, device="cuda", dtype=dtype))
    for _ in range(3):
        x = torch.randn(2, 40, 30, 3, device="cuda", dtype=dtype)
        with torch.no_grad():
            assert relative_error(graph(x), model(x)) < 1e-5
            for parameter in model.parameters():
                parameter.mul_(1.01)
