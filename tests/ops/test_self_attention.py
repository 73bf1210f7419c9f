"""Attention among latents: whatever runs it, the same numbers, derivatives and NaN; zeros where a softmax saturates."""

import pytest
import torch
from support import check_over_draws, needs_extension, relative_error
from torch.autograd import gradcheck, gradgradcheck

import perceiver_fast as pf
from perceiver_fast.ops import self_attention as module
from perceiver_fast.ops.self_attention import self_attention, self_attention_backend

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


def plain(q, k, v, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.mT * scale).softmax(-1) @ v


def qkv(latents=5, channels=4, values=4, dtype=torch.float64, heads=3):
    """As a layer has them: heads of one projection."""
    widths = channels, channels, values
    joint = torch.randn(2, latents, heads * sum(widths), dtype=torch.float64).to(dtype)
    parts = joint.split([heads * width for width in widths], -1)
    return tuple(t.unflatten(-1, (heads, -1)).transpose(1, 2).detach().requires_grad_() for t in parts)


def results(function, inputs, d_o, **options):
    o = function(*inputs, **options)
    return dict(zip("oqkv", (o, *torch.autograd.grad(o, inputs, d_o.to(o.dtype)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("latents, channels, values", [(1, 4, 4), (7, 5, 3), (33, 16, 16), (130, 64, 64)])
def test_errors_are_plain_pytorchs(latents, channels, values, dtype):
    rows = []
    for _ in range(8):
        inputs = qkv(latents, channels, values, dtype)
        d_o = torch.randn(2, 3, latents, values).to(dtype)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        truth, theirs = results(plain, exact, d_o), results(plain, inputs, d_o)
        for name, found in results(self_attention, inputs, d_o).items():
            if latents == 1:
                assert name in "ov" or not found.any()
                torch.testing.assert_close(
                    found.double(), truth[name], rtol=1e-6 if dtype.itemsize > 2 else 1e-2, atol=0
                )
            else:
                rows.append((name, *(relative_error(t, truth[name]) for t in (found, theirs[name]))))
    if latents > 1:
        check_over_draws(rows, floor=1e-8 if dtype == torch.float32 else 1e-4)


def test_inference_is_the_same():
    q, k, v = qkv(40, 16, 16, torch.float32)
    with torch.no_grad():
        inferred = self_attention(q, k, v)
    assert torch.equal(inferred, self_attention(q, k, v))


def test_derivatives_of_every_order():
    inputs = qkv(4, 3, 2)
    assert gradcheck(self_attention, inputs, fast_mode=True)
    assert gradgradcheck(self_attention, inputs, fast_mode=True)
    q, k, v = (t.detach() for t in inputs)
    expected = torch.func.hessian(lambda q: plain(q, k, v).square().sum())(q)
    assert relative_error(torch.func.hessian(lambda q: self_attention(q, k, v).square().sum())(q), expected) < 1e-12


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_saturated_softmax_are_zero(dtype):
    """Every latent holds a token alone: the weights do not change, and nothing but rounding can be left."""
    latents, channels = 24, 32
    q = torch.linalg.qr(torch.randn(channels, latents, dtype=torch.float64))[0].T[None, None].to(dtype)
    q, k = (q.clone().requires_grad_() for _ in range(2))
    v = torch.randn(1, 1, latents, channels, dtype=dtype, requires_grad=True)
    found = results(self_attention, (q, k, v), torch.randn(1, 1, latents, channels), scale=1e4)
    torch.testing.assert_close(found["o"], v)
    assert max(found["q"].norm(), found["k"].norm()) < (
        1e-7 if dtype == torch.float32 else 1e-18
    )  # torch's: 3e-2, 9e-11


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_never_hidden(dtype, grad):
    for latents in (1, 2, 7, 8, 15, 16, 17, 33, 100):
        for name in range(3):
            for value in (NAN, INF, -INF):
                for everywhere in (False, True):
                    inputs = [t.detach() for t in qkv(latents, dtype=dtype)]
                    inputs[name][1, 2, slice(None) if everywhere else latents // 2, 3] = value
                    expected = plain(*(t.float() if dtype.itemsize == 2 else t for t in inputs))
                    out = self_attention(*(t.requires_grad_(grad) for t in inputs))
                    assert not (expected.isnan() & ~out.isnan()).any(), (latents, name, value, everywhere)


@pytest.mark.skipif(**needs_extension)
def test_dropout_is_a_function_of_the_seed():
    q, k, v = qkv(64, 8, 8, torch.float32)
    runs = []
    for threads in (1, 2):
        torch.manual_seed(3)
        torch.set_num_threads(threads)
        runs.append(self_attention(q, k, torch.ones_like(v), dropout=0.5))
    torch.set_num_threads(1)
    assert torch.equal(*runs) and abs(runs[0].mean().item() - 1) < 0.1 and (runs[0] - 1).abs().max() > 0.1


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("heads, latents", [(1, 300), (3, 40), (5, 17)])
def test_any_number_of_threads_gives_the_same_bits(heads, latents):
    """Few heads are cut into groups of latents, as many as there are threads for: no latent's sums depend on it."""
    inputs, runs = qkv(latents, 8, 8, torch.float32, heads), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        runs.append(self_attention(*inputs))
    torch.set_num_threads(1)
    assert all(torch.equal(runs[0], other) for other in runs[1:])


@pytest.mark.skipif(**needs_extension)
def test_what_runs_it(monkeypatch):
    assert self_attention_backend(torch.float32, CPU) == "cpu"
    assert self_attention_backend(torch.float32, torch.device("cuda")) == "sdpa"
    with pf.use_backend("reference"):
        assert self_attention_backend(torch.float32, CPU) == "sdpa"
    for tiles, backend in ((True, "sdpa"), (False, "cpu")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
        assert self_attention_backend(torch.bfloat16, CPU) == backend
        assert self_attention_backend(torch.float64, CPU) == "cpu"
    monkeypatch.setattr(module.extension, "error", "it was not built")
    assert self_attention_backend(torch.float32, CPU) == "sdpa"
