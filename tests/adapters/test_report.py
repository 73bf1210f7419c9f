"""The report, the check on an example, and what they say of models that are not, or only look like, a known one."""

import perceiver_pytorch
import pytest
import torch
from adapters.perceivers import build
from support import needs_extension, relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.adapters import hugging_face
from perceiver_fast.adapters.families import AttentionPreNorm
from perceiver_fast.adapters.forwards import all_stand_ins


@pytest.mark.skipif(**needs_extension)
def test_rows_and_table():
    model, inputs = build("fourier")
    report = pf.accelerate(model, inputs)
    rows = {row.name: row for row in report.rows}
    row = rows["perceiver.encoder.cross_attention"]
    assert row.kind == "layer of cross-attention" and row.way.startswith("grid") and row.gain > 1 and row.why is None
    assert not any(".mlp" in name for name in rows)
    text = str(report)
    assert "perceiver.encoder.self_attends.*" in text and "2 x" in text and "checked in float64" in text
    assert bool(report) and report.check.seconds[0] > 0


@pytest.mark.skipif(**needs_extension)
def test_without_example():
    model, inputs = build("fourier")
    report = pf.accelerate(model)
    assert {row.way for row in report.rows} == {None} and "not called yet" in str(report)
    assert "not checked: pass an example" in str(report)
    model(**inputs)
    assert "grid: grid_attention on cpu" in {row.way for row in report.rows}


@pytest.mark.parametrize(
    "example", [tuple, dict, lambda pairs: list(dict(pairs).values())[0]], ids=["tuple", "dict", "tensor"]
)
def test_forms_of_an_example(example):
    model, inputs = build("fourier")
    given = tuple(inputs.values()) if example is tuple else example(inputs.items())
    assert pf.accelerate(model, given).check.output_error < 1e-12


def test_what_differs_is_put_back(monkeypatch):
    """A stand-in that computes something else is found, named and taken off; the rest stays."""
    right = hugging_face.feed_forward
    monkeypatch.setattr(hugging_face, "feed_forward", lambda mlp, x: (right(mlp, x)[0] * 1.001, right(mlp, x)[1]))
    model, inputs = build("fourier")
    report = pf.accelerate(model, inputs)
    back = [row for row in report.rows if row.why and row.why.startswith("put back: ")]
    assert {row.kind for row in back} >= {"layer of self-attention", "layer of cross-attention"}
    assert report.check.output_error < 1e-9
    left = {type(stand_in).__name__ for _, stand_in in all_stand_ins(model)}
    assert "AttentionForward" in left and "LayerForward" not in left
    with torch.no_grad():
        fast = model(**inputs).logits
        assert (pf.restore(model)(**inputs).logits - fast).abs().max() < 1e-12


def test_a_wrong_gradient_is_found(monkeypatch):
    right = hugging_face.feed_forward
    monkeypatch.setattr(hugging_face, "feed_forward", lambda mlp, x: (right(mlp, x.detach())[0], right(mlp, x)[1]))
    model, inputs = build("fourier")
    report = pf.accelerate(model, inputs)
    assert any("gradient" in (row.why or "") for row in report.rows)
    assert report.check.gradient_error < 1e-9


def test_not_for_these():
    with pytest.raises(TypeError, match="expected an nn.Module, got dict"):
        pf.accelerate({})
    with pytest.raises(TypeError, match="expected an nn.Module, got dict"):
        pf.restore({})
    report = pf.accelerate(nn.TransformerEncoderLayer(8, 2))
    assert not report and "nothing was accelerated" in str(report)
    assert [(row.name, row.why) for row in report.rows] == [("self_attn", "MultiheadAttention is of no known family")]
    ours = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
    assert not pf.accelerate(ours) and not pf.accelerate(ours).rows


def test_an_example_that_does_not_fit():
    model = perceiver_pytorch.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
    with pytest.raises(AssertionError, match="right number of axis"):
        pf.accelerate(model, torch.randn(1, 6, 3))


def test_a_stand_in_that_raises_is_put_back(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(AttentionPreNorm, "run", broken)
    model = perceiver_pytorch.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
    x = torch.randn(1, 6, 6, 3)
    expected = model(x)
    report = pf.accelerate(model, x)
    named = {row.name for row in report.rows if row.why and "put back: it raises RuntimeError" in row.why}
    assert named == {"layers.0.cross_attn", "layers.0.self_attns.0.0"}
    assert relative_error(model(x), expected) < 1e-5
