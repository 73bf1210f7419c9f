"""torch.compile of whole models: one graph, any batch, no recompilation, forward and backward."""

import pytest
import torch
from support import relative_error

import perceiver_fast as pf

KEYWORDS = dict(
    num_freq_bands=4, depth=2, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_heads=2, cross_dim_head=5, num_classes=6,
)  # fmt: skip
SHALLOW = dict(depth=1)  # tracing takes time: what two layers show, other tests here show


@pytest.fixture(autouse=True)
def compile_afresh():
    torch.use_deterministic_algorithms(False)  # inductor's own code has no use for NaN-filled memory
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, data, mask=None):
    model.zero_grad()
    out = model(data, mask=mask)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("extra", [{}, dict(fourier_encode_data=False, input_channels=9) | SHALLOW], ids=str)
def test_one_graph_for_any_batch(extra):
    model = pf.Perceiver(**KEYWORDS | extra)
    channels = extra.get("input_channels", 3)
    compiled = torch.compile(model, fullgraph=True, dynamic=None)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch in (2, 3):  # the first change of the batch makes it a symbol
            compiled(torch.randn(batch, 5, 6, channels))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 5, 9, 4):
            data = torch.randn(batch, 5, 6, channels)
            with torch.no_grad():
                expected = model(data)
            assert relative_error(compiled(data), expected) < 1e-5


def test_training_steps_do_not_recompile():
    model = pf.Perceiver(**KEYWORDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(4):
        data, mask = torch.randn(2, 5, 6, 3), torch.rand(2, 5, 6) > 0.3
        expected_out, expected = gradients(model, data, mask)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            out, actual = gradients(compiled, data, mask)
        assert relative_error(out, expected_out) < 1e-5
        for a, b in zip(actual, expected):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
        optimizer.step()


def test_other_image_sizes_and_data_gradients():
    model = pf.Perceiver(**KEYWORDS | SHALLOW)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((5, 6), (8, 9), (7, 12)):
        data = torch.randn(2, *sizes, 3, requires_grad=True)
        (expected,) = torch.autograd.grad(model(data).square().sum(), data)
        (actual,) = torch.autograd.grad(compiled(data).square().sum(), data)
        assert relative_error(actual, expected) < 1e-4


def test_autocast_inside():
    model = pf.Perceiver(**KEYWORDS).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = torch.randn(2, 5, 6, 3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative_error(compiled(data), model(data)) < 0.05
