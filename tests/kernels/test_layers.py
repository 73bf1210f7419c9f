"""Layers whose attention runs on the Triton kernels: whole models against the reference, in float32 and under autocast."""

import pytest
import torch
from support import outputs_and_gradients, relative_error

import perceiver_fast as pf

MODELS = {
    "grid": (
        dict(num_freq_bands=3, depth=2, max_freq=8.0, num_latents=9, latent_dim=16, cross_heads=2, num_classes=5),
        (2, 7, 33, 3),
    ),
    "absorbed": (
        dict(fourier_encode_data=False, num_freq_bands=1, depth=1, max_freq=4.0, input_channels=12, input_axis=1,
             num_latents=40, latent_dim=16, cross_dim_head=64, num_classes=5),
        (2, 90, 12),
    ),
}  # fmt: skip
MODELS |= {
    f"{name}, inverted": (keywords | dict(inverted_cross_attn=True), shape)
    for name, (keywords, shape) in MODELS.items()
}


@pytest.mark.parametrize("name", MODELS)
def test_model(device, name):
    keywords, shape = MODELS[name]
    model = pf.Perceiver(**keywords).to(device)
    data = torch.randn(shape, device=device)
    mask = torch.rand(shape[0], *shape[1:-1], device=device) > 0.2
    layer = pf.explain(model, data, mask).layers[0]
    assert layer.choice.backend == "triton", layer
    fast = outputs_and_gradients(model, data, mask)
    with pf.use_backend("reference"):
        exact = outputs_and_gradients(model.double(), data.double(), mask)
    assert relative_error(fast[0], exact[0]) < 1e-5
    largest = max(gradient.norm() for gradient in exact[1].values())
    for key, gradient in exact[1].items():  # inverted, those of some biases are zero
        assert (fast[1][key] - gradient).norm() < 1e-4 * gradient.norm().clamp_min(1e-3 * largest), key


@pytest.mark.parametrize("name", MODELS)
def test_autocast(device, name):
    """Attention in bfloat16: as far from float64 as that dtype, and not further than plain PyTorch twice."""
    keywords, shape = MODELS[name]
    model, data = pf.Perceiver(**keywords).to(device).eval(), torch.randn(shape, device=device)
    with torch.no_grad():
        with pf.use_backend("reference"):
            exact = model.double()(data.double())
            model.float()
            with torch.autocast(device.type, torch.bfloat16):
                plain = model(data)
        with torch.autocast(device.type, torch.bfloat16):
            fast = model(data)
    assert fast.dtype == plain.dtype
    assert relative_error(fast, exact) <= 2 * relative_error(plain, exact) + 2e-3


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_gradients_under_autocast(device, offset):
    """Products with tables are rounded as plain PyTorch rounds keys and values, and no worse."""
    keywords, shape = MODELS["grid"]
    torch.manual_seed(0)
    model, data = pf.Perceiver(**keywords, cross_dim_head=64).to(device), torch.randn(shape, device=device) + offset
    with torch.autocast(device.type, torch.bfloat16):
        fast = outputs_and_gradients(model, data)
        with pf.use_backend("reference"):
            plain = outputs_and_gradients(model, data)
    with pf.use_backend("reference"):
        exact = outputs_and_gradients(model.double(), data.double())
    for key, gradient in exact[1].items():
        assert relative_error(fast[1][key], gradient) <= 2 * relative_error(plain[1][key], gradient) + 4e-3, key


@pytest.mark.parametrize("grid", [True, False])
def test_decoder_of_described_queries(device, grid):
    """In float32, under autocast, in parts into a tensor, and its gradients; by the description, without the queries."""
    torch.manual_seed(0)
    keywords = dict(num_freq_bands=2, max_freq=4.0)
    queries = (
        pf.grid_queries((4, 9), **keywords) if grid else pf.point_queries(torch.rand(1, 36, 2) * 2 - 1, **keywords)
    )
    model = pf.PerceiverIO(
        depth=0, dim=4, queries_dim=queries.channels, logits_dim=2, num_latents=40, latent_dim=8, cross_heads=2,
        cross_dim_head=16,
    ).to(device)  # fmt: skip
    data = torch.randn(2, 6, 4, device=device)
    (found,) = (row for row in pf.explain(model, data, queries=queries).layers if row.layer == "decoder_cross_attn")
    assert (found.path, found.choice.op, found.choice.backend) == ("described", "grid_query_attention", "triton")

    def results(function=lambda o: o, **options):
        o = model(data.to(next(model.parameters())), queries=queries, **options)
        loss = function(o.double()).square().sum()
        return [o.detach(), *torch.autograd.grad(loss, list(model.decoder_cross_attn.parameters()))]

    fast = results()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        rounded = model(data, queries=queries)
    out = torch.empty(2, 36, 2, device=device)
    model.decode_into(out, data, queries)
    with pf.use_backend("reference"):
        model.double()
        exact = results()
    for mine, theirs in zip(fast, exact):
        assert relative_error(mine, theirs) < 1e-4 and mine.shape == theirs.shape
    assert relative_error(out, exact[0]) < 1e-5
    assert rounded.dtype == torch.bfloat16 and 1e-4 < relative_error(rounded, exact[0]) < 2e-2
