"""Weights, pickles, caches and inputs: a model leaves nothing behind, and assumes nothing about what it is called with."""

import copy
import io
import pickle
import sys

import pytest
import torch
from contract_cases import MODELS, agree, inputs, pair, step
from torch import nn
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import experimental, gated, mixed_latents, perceiver_io, perceiver_pytorch


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_pickled_by_perceiver_pytorch_load(name, monkeypatch):
    """A model pickled by perceiver-pytorch is loaded with perceiver-fast in its place in sys.modules."""
    theirs, ours = pair(name)
    file = pickle.dumps(theirs)
    expected = step(theirs, **inputs(name))
    modules = {"": pf, ".perceiver_pytorch": perceiver_pytorch, ".perceiver_io": perceiver_io, ".gated": gated}
    modules |= {".mixed_latents": mixed_latents, ".experimental": experimental}
    for path, module in modules.items():
        monkeypatch.setitem(sys.modules, f"perceiver_pytorch{path}", module)
    loaded = pickle.loads(file)
    assert type(loaded) is type(ours)
    agree([step(loaded, **inputs(name)), expected])
    if not isinstance(loaded, (pf.PerceiverBlock, pf.PerceiverLM)):
        assert loaded.checkpoint is False and loaded.input_dim == ours.input_dim
    agree([copy.deepcopy(loaded)(**inputs(name)), expected[0]])


@pytest.mark.parametrize("name", MODELS)
def test_models_are_saved_whole(name):
    _, ours = pair(name)
    with torch.no_grad():
        ours(**inputs(name))  # what it caches in inference is not pickled
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(**inputs(name)), ours(**inputs(name)))


def own_head(width=16):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3))


HEADS = [
    own_head,
    lambda: nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3)),
    lambda: nn.Linear(16, 3),
    nn.Identity,
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["perceiver", "gated", "mixed latents", "experimental"])
def test_a_model_with_a_head_of_its_own_loads_what_it_saved(name, head):
    saved, loaded = (pair(name, change=lambda m: setattr(m, "to_logits", head()))[1] for _ in range(2))
    with torch.no_grad():
        for p in saved.parameters():
            p.add_(1)
    assert str(loaded.load_state_dict(saved.state_dict())) == "<All keys matched successfully>"
    for a, b in zip(saved.parameters(), loaded.parameters()):
        assert torch.equal(a, b)


def test_layers_that_have_the_names_of_older_releases_load_what_they_saved():
    def change(model):
        model.layers[0] = nn.ModuleList([model.layers[0].cross_attn, model.layers[0].cross_ff])
        model.layers[1].cross_attn.fn.to_out = nn.Sequential(model.layers[1].cross_attn.fn.to_out, nn.Dropout(0.1))

    saved, loaded = (pair("perceiver", change=change, depth=2)[1] for _ in range(2))
    state = saved.state_dict()
    assert {"layers.0.0.norm.weight", "layers.1.cross_attn.fn.to_out.0.weight"} <= state.keys()
    assert str(loaded.load_state_dict(state)) == "<All keys matched successfully>"


@pytest.mark.parametrize("name", MODELS)
def test_empty_batches(name):
    _, ours = pair(name)
    empty = {key: value[:0] for key, value in inputs(name).items()}
    shape = ours(**inputs(name)).shape
    for training in (True, False):
        out = ours.train(training)(**empty)
        assert out.shape == (0, *shape[1:])
        out.sum().backward()
        with torch.no_grad():
            assert ours(**empty).shape == (0, *shape[1:])


@pytest.mark.parametrize("extra", [dict(attn_dropout=0.3, ff_dropout=0.2), dict(checkpoint=True)])
def test_empty_batches_in_training(extra):
    ours = pair("perceiver", **({} if "checkpoint" in extra else extra))[1]
    ours.checkpoint = extra.get("checkpoint", False)
    ours(torch.randn(0, 6, 5, 3), mask=torch.ones(0, 6, 5, dtype=torch.bool)).sum().backward()
    points = ours(torch.randn(0, 7, 3), coords=torch.rand(0, 7, 2))
    assert points.shape == (0, 5)


# What perceiver-pytorch itself saves for the backward, and so must not be changed before it with either library.
KEPT = {"perceiver dense": ["data"], "io": ["data", "queries"], "lm": ["x"], "block": ["x", "context"]}
KEPT |= {"block joined": ["x", "context"], "experimental": ["data"]}


@pytest.mark.parametrize("name", MODELS)
def test_inputs_may_be_refilled_before_the_backward(name):
    for model in pair(name):
        expected = step(model, **inputs(name))
        model.zero_grad()
        call = {key: value.clone() for key, value in inputs(name).items()}
        loss = model(**call).square().mean()
        for key, value in call.items():
            if key not in KEPT.get(name, ()):
                value.zero_()
        loss.backward()
        agree([[p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None], expected[1:]])


@pytest.mark.parametrize("name", MODELS)
def test_inference_tensors_can_be_trained_on(name):
    _, ours = pair(name)
    expected = step(ours, **inputs(name))
    with torch.inference_mode():
        call = {key: value.clone() for key, value in inputs(name).items()}
    agree([step(ours, **call), expected])


CODE = """
import sys, torch
import perceiver_fast as pf
data = torch.randn(1, 6, 5, 3)
arguments = dict(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
first = pf.Perceiver(**arguments)
for name in [n for n in sys.modules if n.split(".")[0] == "perceiver_fast"]:
    del sys.modules[name]
import perceiver_fast as again
second = again.Perceiver(**arguments)
second.load_state_dict(first.state_dict())
assert again is not pf
for model in (first, second):
    out = model(data)
    out.sum().backward()
    assert torch.equal(out, first(data))
    assert torch.allclose(torch.compile(model, backend="eager")(data), out, atol=1e-5)
import importlib, gc
del pf, first, model
gc.collect()
importlib.reload(again)
assert torch.equal(second(data), out)
"""


def test_it_can_be_imported_again():
    done = python("-c", CODE)
    assert done.returncode == 0, done.stderr[-2000:]


IMPORTS = """
from perceiver_fast.perceiver_pytorch import (
    Perceiver, PerceiverBlock, PreNorm, Attention, FeedForward, GEGLU, EnformerAttentionResidual, fourier_encode, cache_fn,
    exists, default, l1norm, LinearNoBias)
from perceiver_fast.perceiver_io import (
    PerceiverIO, PerceiverLM, PreNorm, Attention, FeedForward, GEGLU, EnformerAttentionResidual, cache_fn, exists, default,
    l1norm, dropout_seq, LinearNoBias)
from perceiver_fast.gated import Perceiver, Residual, GRUGating
from perceiver_fast.mixed_latents import Perceiver, Mixer
from perceiver_fast.experimental import Perceiver, LinearAttention
import sys, perceiver_fast
sys.modules["perceiver_pytorch"] = perceiver_fast
from perceiver_pytorch import Perceiver, PerceiverBlock, PerceiverIO, PerceiverLM
from perceiver_pytorch.perceiver_pytorch import Attention, PreNorm, FeedForward, fourier_encode
from perceiver_pytorch.perceiver_io import PerceiverIO, Attention
from perceiver_pytorch.gated import Perceiver
from perceiver_pytorch.mixed_latents import Perceiver
from perceiver_pytorch.experimental import LinearAttention
"""


def test_import_paths():
    done = python("-c", IMPORTS)
    assert done.returncode == 0, done.stderr[-2000:]


def test_two_threads_may_be_looked_at():
    """explain and attention_map see only the forward of their own thread, whichever ends first."""
    import threading

    from perceiver_fast.layers.observer import Observer, observer, observing

    inside, leave = threading.Event(), threading.Event()

    def other():
        with observing(Observer()):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    mine = Observer()
    thread.start()
    inside.wait(10)
    with observing(mine):
        assert observer() is mine
        leave.set()
        thread.join()
        assert observer() is mine
    assert observer() is None


BATCHED = {
    "block among itself": (
        lambda: pf.PerceiverBlock(dim=16, has_cross_attn=False, latent_heads=2, latent_dim_head=8),
        {},
    ),
    "block": (
        lambda: pf.PerceiverBlock(dim=16, context_dim=12, latent_heads=2, latent_dim_head=8),
        dict(context=torch.randn(3, 7, 12)),
    ),
    "cross-attention": (
        lambda: perceiver_pytorch.PreNorm(16, perceiver_pytorch.Attention(16, 12, 2, 8), 12),
        dict(context=torch.randn(3, 7, 12)),
    ),
    "residual": (lambda: gated.Residual(perceiver_pytorch.PreNorm(16, perceiver_pytorch.FeedForward(16))), {}),
}


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("name", BATCHED)
def test_latents_expanded_over_the_batch(name, learning):
    """Latents that the batch shares are computed with once; outputs and gradients are those of every row."""
    build, call = BATCHED[name]
    layer, latents = build(), torch.randn(1, 5, 16)
    results = []
    for x in (latents.expand(3, -1, -1), latents.repeat(3, 1, 1)):
        x = x.detach().requires_grad_(learning)
        weight = torch.arange(1.0, 4.0).view(3, 1, 1)  # every row its own gradient
        with torch.set_grad_enabled(learning):
            out = layer(x, **call)
            assert out.shape == (3, 5, 16)
        wanted = [x, *layer.parameters()] if learning else []
        results.append([out, *(torch.autograd.grad((out * weight).square().sum(), wanted) if learning else [])])
    agree(results, 1e-4)


def test_a_pass_through_in_the_place_of_the_first_block():
    class Pass(nn.Module):
        def forward(self, x, **keywords):
            return x

    models = pair("io", change=lambda m: setattr(m, "cross_attend_block", Pass()))
    agree([step(m, **inputs("io")) for m in models])
    agree([m(inputs("io")["data"]) for m in models])
