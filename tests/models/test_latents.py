"""Models large enough for their products to leave torch's own: accuracy with every library, in float32 and bfloat16."""

import importlib

import perceiver_pytorch
import pytest
import torch
from support import relative_error

import perceiver_fast as pf
from perceiver_fast.ops import linear_choice, linear_libraries

CONFIG = dict(
    num_freq_bands=6,
    depth=3,
    max_freq=10.0,
    num_latents=64,
    latent_dim=128,
    num_classes=10,
    self_per_cross_attn=2,
    weight_tie_layers=True,
)
LIBRARIES = [name for name in linear_libraries.NAMES if name != "auto" and not linear_libraries.reasons(name)]


@pytest.fixture(params=LIBRARIES, autouse=True)
def library(request, monkeypatch):
    monkeypatch.setattr(importlib.import_module("perceiver_fast.ops.linear"), "LARGE", 1)
    with pf.use_linear(request.param):
        yield request.param


def models():
    torch.manual_seed(0)
    theirs = perceiver_pytorch.Perceiver(**CONFIG)
    ours = pf.Perceiver(**CONFIG)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def image():
    return torch.randn(2, 20, 24, 3, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    out = model(x)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    parameters = [p for _, p in sorted(model.named_parameters())]
    return [out, *torch.autograd.grad(out, parameters, cotangent)]


def test_float32_is_as_exact_as_theirs():
    theirs, ours = models()
    x = image()
    plain, mine = gradients(theirs, x), gradients(ours, x)
    exact = gradients(theirs.double(), x.double())
    for got, other, want in zip(mine, plain, exact):
        assert relative_error(got, want) <= 2 * relative_error(other, want) + 3e-7
    with torch.no_grad():
        assert relative_error(ours.eval()(x), exact[0]) <= 2 * relative_error(plain[0], exact[0]) + 1e-7


def test_float64_agrees():
    theirs, ours = (model.double() for model in models())
    for got, want in zip(gradients(ours, image().double()), gradients(theirs, image().double())):
        assert relative_error(got, want) < 1e-10


def error_in(how, model, x, want):
    """Errors of the embedding, thousands of numbers: those of ten logits would depend on how each happens to round."""
    with torch.no_grad():
        if how == "weights":
            return relative_error(model.bfloat16()(x.bfloat16(), return_embeddings=True), want)
        with torch.autocast("cpu", torch.bfloat16):
            return relative_error(model(x, return_embeddings=True), want)


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16 products", "float32 products"])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bfloat16_is_no_worse_than_theirs(how, wide, monkeypatch):
    monkeypatch.setattr(linear_choice, "float32_is_faster", lambda: wide)
    theirs, ours = (model.eval() for model in models())
    x = image()
    with torch.no_grad():
        want = theirs.double()(x.double(), return_embeddings=True)
    theirs = theirs.float()
    assert error_in(how, ours, x, want) <= 1.05 * error_in(how, theirs, x, want)


def test_bfloat16_gradients_are_no_worse_than_theirs():
    theirs, ours = models()
    x = image()
    exact = gradients(theirs.double(), x.double())
    theirs = theirs.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, mine = gradients(theirs, x), gradients(ours, x)
    for got, other in zip(mine, plain):
        assert got.dtype == other.dtype

    def mean(found):
        return sum(relative_error(g, w) for g, w in zip(found, exact)) / len(exact)

    assert mean(mine) <= 1.1 * mean(plain)
