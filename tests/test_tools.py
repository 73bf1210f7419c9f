"""explain, the backend switch and the command line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support import needs_extension

import perceiver_fast as pf
from perceiver_fast import __main__ as command_line
from perceiver_fast import extension

SMALL = dict(
    num_freq_bands=4, depth=3, max_freq=10.0, num_latents=7, latent_dim=16, latent_heads=2, latent_dim_head=8,
    cross_heads=2, cross_dim_head=5, num_classes=6,
)  # fmt: skip


def python(code, **env):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(**needs_extension)
def test_explain_names_paths_and_reasons():
    data = torch.randn(1, 5, 6, 3)
    model = pf.Perceiver(**SMALL | dict(inverted_cross_attn=(False, True, False)))
    text = str(pf.explain(model, data))
    assert "7 latents" in text and "5 x 6 tokens" in text
    layers = {path.layer: path for path in pf.explain(model, data).layers}
    assert all(layers[f"layers.{i}.cross_attn"].choice.op == "grid_attention" for i in range(3))
    assert layers["layers.0.cross_attn"].path == "grid" and "projected" in layers["layers.0.cross_attn"].work
    assert "self_attention on sdpa" in text and "with grid_scale on cpu" in text
    model = pf.Perceiver(**SMALL | dict(attn_dropout=0.1))
    assert "grid_attention on cpu" in str(pf.explain(model, data))  # dropout is the kernel's too
    sound = pf.Perceiver(**SMALL | dict(input_axis=1))
    text = str(pf.explain(sound, torch.randn(1, 2000, 3)))
    assert "cross_attention on cpu (projected" in text and "points are no grid" in text
    assert "with fourier_projection on cpu" in text
    assert "grid_attention on cpu" in str(pf.explain(sound, torch.randn(1, 200, 3)))
    own = pf.Perceiver(**SMALL | dict(fourier_encode_data=False, cross_dim_head=16))
    text = str(pf.explain(own, data))
    assert "dense tokens are no grid" in text and "cross_attention on cpu (absorbed" in text and "more work" in text
    with pf.use_backend("reference"):
        assert "grid_attention on reference" in str(pf.explain(pf.Perceiver(**SMALL), data))
    with pytest.raises(TypeError, match="perceiver_fast model, got Linear"):
        pf.explain(torch.nn.Linear(2, 2), data)


@pytest.mark.skipif(**needs_extension)
def test_explain_runs_every_model_on_shapes_alone():
    models = {
        "io": (pf.PerceiverIO(depth=1, dim=9, queries_dim=6, num_latents=8, latent_dim=16), torch.randn(2, 30, 9)),
        "lm": (
            pf.PerceiverLM(dim=12, num_tokens=50, max_seq_len=64, depth=1, num_latents=8, latent_dim=16),
            torch.randint(0, 50, (2, 30)),
        ),
    }
    for name in ("gated", "mixed_latents", "experimental"):
        keywords = {k: v for k, v in SMALL.items()}
        models[name] = (getattr(pf, name).Perceiver(**keywords), torch.randn(1, 5, 6, 3))
    for name, (model, data) in models.items():
        keywords = dict(queries=torch.randn(10, 6)) if name == "io" else {}
        paths = pf.explain(model, data, **keywords).layers
        cross = [path for path in paths if path.choice.op != "self_attention"]
        assert all(path.choice.backend == "cpu" for path in cross), name
        assert len(cross) == {"io": 2, "lm": 2, "gated": 3, "mixed_latents": 3, "experimental": 5}[name]
    many = pf.explain(models["io"][0], models["io"][1], queries=torch.empty(100_000, 6)).layers
    assert [path.layer for path in many].count("decoder_cross_attn") == 1  # decoded in parts


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


def test_info(capsys):
    assert command_line.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["perceiver_fast"] == pf.__version__ and info["backends"]["grid_attention"]["cpu"]["reference"] == []
    assert command_line.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "grid_attention on cuda: cpu" in shown and "not cuda" in shown
    assert info["cuda_kernels"]["loaded"] == (extension.cuda_error is None)
    assert info["cuda_kernels"].get("reason") == extension.cuda_error and "cuda kernels: loaded" in shown
    if torch.version.cuda is None:
        assert "is not a CUDA build" in extension.cuda_error or "not built" in extension.cuda_error


def test_info_runs_without_the_extension():
    out = subprocess.run(
        [sys.executable, "-m", "perceiver_fast", "info"],
        env=os.environ | {"PERCEIVER_FAST_CPU_ISA": "none of them"},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and "failed to load" in out.stdout and "None" not in out.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"]], ids=str)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main(arguments)
    assert done.value.code == 0 and "usage" in capsys.readouterr().out
