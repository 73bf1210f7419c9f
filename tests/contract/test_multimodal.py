"""MultimodalPerceiver, which perceiver-pytorch does not have: fused or called module by module, it is one model."""

import accelerate
import pytest
import torch
from contract_cases import agree
from torch import nn

import perceiver_fast as pf

VIDEO = pf.Modality("video", input_channels=3, input_axis=3, num_freq_bands=3, max_freq=6.0)
AUDIO = pf.Modality("audio", input_channels=1, input_axis=1, num_freq_bands=5, max_freq=40.0)
CLOUD = pf.Modality("cloud", input_channels=0, input_axis=3, num_freq_bands=2, max_freq=8.0)
HEADS = dict(cross_heads=2, cross_dim_head=8, latent_heads=2, latent_dim_head=8)


def build():
    torch.manual_seed(0)
    return pf.MultimodalPerceiver([VIDEO, AUDIO, CLOUD], depth=2, num_latents=6, latent_dim=16, num_classes=5, **HEADS)


def call(masked=True):
    torch.manual_seed(1)
    data = {
        "video": torch.randn(2, 3, 4, 5, 3),
        "audio": torch.randn(2, 30, 1),
        "cloud": (torch.randn(2, 20, 0), torch.rand(2, 20, 3) * 2 - 1),
    }
    return dict(
        data=data, mask={"audio": torch.rand(2, 30) > 0.4, "video": torch.rand(2, 3, 4, 5) > 0.4} if masked else None
    )


def step(model, **call):
    model.zero_grad()
    out = model(**call)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def watched(model):
    """A copy of the model with a hook on every module, so that all modules are called; the hooks do nothing."""
    for module in model.modules():
        module.register_forward_hook(lambda *a: None)
    return model


@pytest.mark.parametrize("masked", [False, True])
def test_called_or_fused(masked):
    agree([step(build(), **call(masked)), step(watched(build()), **call(masked))])


@pytest.mark.parametrize("masked", [False, True])
def test_a_hook_on_one_module(masked):
    names = [n for n, m in build().named_modules() if n and not isinstance(m, (nn.ModuleList, nn.ParameterDict))]
    assert len(names) > 50
    models, given = (build(), watched(build())), call(masked)
    for name in names:
        results, fired = [], []
        for model in models:
            module = model.get_submodule(name)
            handle = module.register_forward_hook(
                lambda module, args, out: (fired.append((type(out), out.shape)), out * 0.5)[1]
            )
            results.append(step(model, **given))
            handle.remove()
        agree(results, where=name)
        assert len(fired) == 2 and fired[0] == fired[1] and fired[0][0] is torch.Tensor, name


def test_modules_that_are_watched_get_all_tokens_joined():
    model, seen = build(), []
    tokens = model.describe(call()["data"], model.check_inputs(**call()))
    model.layers[0].register_forward_hook(lambda m, args, kwargs, out: seen.append(kwargs), with_kwargs=True)
    model(**call())
    assert type(seen[0]["context"]) is torch.Tensor and seen[0]["context"].shape == (2, 60 + 30 + 20, model.input_dim)
    assert torch.equal(seen[0]["context"], tokens.materialize()) and seen[0]["mask"].shape == (2, 110)


def test_offloaded_weights_come_when_they_are_needed():
    model = build().eval()
    with torch.no_grad():
        expected = model(**call())
        agree([accelerate.cpu_offload(model, execution_device="cpu")(**call()), expected])
