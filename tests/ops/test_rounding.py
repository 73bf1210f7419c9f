"""Parameters that autocast rounds: once a call where layers are shared, as torch's own autocast does."""

import copy

import perceiver_pytorch
import pytest
import torch
from torch import nn

import perceiver_fast as pf
from perceiver_fast.ops import rounding
from perceiver_fast.ops.rounding import rounded, rounding_once

CPU = torch.device("cpu")


def under_autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_kept_inside_alone():
    weight = nn.Parameter(torch.randn(3, 4))
    with under_autocast():
        assert rounded(weight, torch.bfloat16) is not rounded(weight, torch.bfloat16)
        with rounding_once(CPU, shared=False):
            assert rounded(weight, torch.bfloat16) is not rounded(weight, torch.bfloat16)
        with rounding_once(CPU):
            kept = rounded(weight, torch.bfloat16)
            assert rounded(weight, torch.bfloat16) is kept and rounded(weight, torch.float16) is not kept
            with rounding_once(CPU):  # a model inside a model
                assert rounded(weight, torch.bfloat16) is kept
        assert rounded(weight, torch.bfloat16) is not kept
    with rounding_once(CPU):
        assert rounded(weight, torch.bfloat16) is not rounded(weight, torch.bfloat16)
    many = nn.Parameter(torch.empty(1).expand(rounding.MOST_KEPT + 1))
    for parameters, keeps in ((tuple, True), (lambda: [weight], True), (lambda: [weight, many], False)):
        with under_autocast(), torch.no_grad(), rounding_once(CPU, parameters=parameters):
            assert (rounded(weight, torch.bfloat16) is rounded(weight, torch.bfloat16)) == keeps
        with under_autocast(), rounding_once(CPU, parameters=parameters):  # they would be saved in any case
            assert rounded(weight, torch.bfloat16) is rounded(weight, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), rounding_once(CPU):
        assert rounded(weight, torch.bfloat16) is not rounded(weight, torch.bfloat16)
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with under_autocast(), rounding_once(CPU):
        assert rounded(frozen, torch.bfloat16) is not rounded(frozen, torch.bfloat16)
    assert rounded(weight, torch.float32) is weight


def test_content_that_changed_is_rounded_again():
    weight = nn.Parameter(torch.zeros(3))
    with under_autocast(), rounding_once(CPU):
        rounded(weight, torch.bfloat16)
        with torch.no_grad():
            weight += 1
        assert rounded(weight, torch.bfloat16).sum() == 3
        weight.data = torch.full((3,), 2.0)
        assert rounded(weight, torch.bfloat16).sum() == 6


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_first_use_without_gradients_takes_none_from_the_next(without):
    weight = nn.Parameter(torch.ones(3))
    with under_autocast(), rounding_once(CPU):
        with without():
            rounded(weight, torch.bfloat16)
        (rounded(weight, torch.bfloat16) * 2).sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


SIZES = dict(weight_tie_layers=True, num_latents=64, latent_dim=512, cross_heads=2, latent_heads=4)
IMAGES = dict(depth=4, num_freq_bands=2, max_freq=8.0, num_classes=5)
ROWS = dict(depth=3, dim=48, queries_dim=8, logits_dim=5)
KINDS = {
    "perceiver": (perceiver_pytorch.Perceiver, pf.Perceiver, IMAGES, (2, 8, 8, 3)),
    "io": (perceiver_pytorch.PerceiverIO, pf.PerceiverIO, ROWS, (2, 40, 48)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_of_shared_layers_are_as_exact_as_theirs(kind, checkpoint):
    """Under autocast, on average over parameters, against float64."""
    theirs, ours, options, shape = KINDS[kind]
    options, x = options | SIZES, torch.randn(shape)
    original = theirs(**options)
    model = ours(**options)
    model.load_state_dict(original.state_dict())
    model.checkpoint = checkpoint
    exact = copy.deepcopy(original).double()

    def gradients(model, dtype):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            out = model(x.to(dtype))
        out.double().square().sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}

    truth = gradients(exact, torch.float64)

    def error(found):
        return sum(float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth)

    assert 0 < error(gradients(model, torch.float32)) <= 2 * error(gradients(original, torch.float32))


@pytest.mark.parametrize("shared", [False, True])
def test_only_models_of_shared_layers_keep_anything(shared):
    options = dict(num_freq_bands=2, max_freq=8.0, num_latents=64, latent_dim=512, num_classes=5)
    model = pf.Perceiver(depth=3, weight_tie_layers=shared, **options)
    seen = []
    model.layers[2].register_forward_pre_hook(lambda *_: seen.append(rounding._kept.get()))
    with under_autocast():
        model(torch.randn(1, 8, 8, 3))
    assert bool(seen[-1]) is shared and rounding._kept.get() is None
