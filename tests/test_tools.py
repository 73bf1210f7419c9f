"""attention_map and the backend switch."""

import os
import subprocess
import sys

import pytest
import torch
from support import model_pair, relative_error

import perceiver_fast as pf

SMALL = dict(
    num_freq_bands=4, depth=3, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_heads=2, cross_dim_head=5, num_classes=6,
)  # fmt: skip


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    return done.stdout + done.stderr


def their_attention(model, data, layer, mask):
    """Weights of perceiver-pytorch's cross-attention, caught where it drops none of them."""
    caught = []
    dropout = model.layers[layer].cross_attn.fn.dropout
    handle = dropout.register_forward_hook(lambda module, args, out: caught.append(out))
    model(data, mask=mask)
    handle.remove()
    calls = [i for i, block in enumerate(model.layers) if block is model.layers[layer]]
    return caught[calls.index(layer)]  # [B H, N, M]


@pytest.mark.parametrize("extra", [{}, dict(weight_tie_layers=True), dict(fourier_encode_data=False)], ids=str)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_map_is_their_attention(extra, layer, masked):
    theirs, ours = model_pair(torch.float64, **SMALL | extra)
    data = torch.randn(2, 5, 6, 3, dtype=torch.float64)
    mask = torch.rand(2, 5, 6) > 0.4 if masked else None
    expected = their_attention(theirs, data, layer, mask).view(2, 2, 7, 5, 6)
    ours.train()
    ours.layers[0].cross_ff.eval()  # frozen by its user
    actual = pf.attention_map(ours, data, layer=layer, latents=[0, 3, 6], mask=mask)
    assert relative_error(actual, expected[:, :, [0, 3, 6]]) < 1e-12
    assert ours.training and not ours.layers[0].cross_ff.training and ours.layers[0].cross_attn.training
    assert not ours.layers[layer].cross_attn._forward_pre_hooks


def test_attention_map_says_what_is_wrong():
    model, data = pf.Perceiver(**SMALL | dict(inverted_cross_attn=True)), torch.randn(1, 5, 6, 3)
    with pytest.raises(IndexError, match=r"layer in 0\.\.2, got 3"):
        pf.attention_map(model, data, layer=3)
    with pytest.raises(IndexError, match=r"latents in 0\.\.6, got \[7\]"):
        pf.attention_map(model, data, latents=[1, 7])
    with pytest.raises(ValueError, match="inverted"):
        pf.attention_map(model, data)


def test_use_backend_sets_and_restores():
    pf.use_backend("reference")
    with pf.use_backend("cpu"):
        assert pf.backends.forced_backend() == "cpu"
    assert pf.backends.forced_backend() == "reference"
    show = "import perceiver_fast as pf; print(pf.backends.forced_backend())"
    assert python(show, PERCEIVER_FAST_BACKEND="reference").strip() == "reference"
    assert "expected one of 'auto'" in python(show, PERCEIVER_FAST_BACKEND="fast")


def test_import_neither_compiles_nor_initialises_cuda():
    code = """
import sys, torch, perceiver_fast, perceiver_fast.kernels
print("torch._inductor" in sys.modules, "torch._dynamo" in sys.modules, torch.cuda.is_initialized())
"""
    assert python(code).strip() == "False False False"
