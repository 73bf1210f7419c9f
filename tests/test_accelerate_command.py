"""``perceiver-fast accelerate MODULE:CALLABLE``."""

import json
import sys

import pytest

from perceiver_fast import __main__ as command_line

SOURCE = """
import perceiver_pytorch
import torch

SIZES = dict(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8, num_classes=3)


def model():
    return perceiver_pytorch.Perceiver(**SIZES)


def with_example():
    return model(), torch.randn(2, 6, 5, 3)


def nothing():
    return torch.nn.Linear(2, 2), torch.randn(1, 2)


def text():
    return "model"
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of models in the current folder, whose name is returned."""
    (tmp_path / "some_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "some_models"
    sys.modules.pop("some_models", None)


def test_a_table(models, capsys):
    assert command_line.main(["accelerate", f"{models}:with_example"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "layers.0.cross_attn" in shown and "grid_attention" in shown and "checked in float64" in shown


def test_json(models, capsys):
    assert command_line.main(["accelerate", f"{models}:with_example", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["check"]["output_error"] < 1e-9 and {"name", "kind", "way", "gain", "why"} == set(found["rows"][0])


def test_without_an_example(models, capsys):
    assert command_line.main(["accelerate", f"{models}:model"]) == 0
    assert "not checked" in capsys.readouterr().out


def test_nothing_to_accelerate(models, capsys):
    assert command_line.main(["accelerate", f"{models}:nothing"]) == 1
    assert "nothing was accelerated" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source, says",
    [
        ("some_models", "expected MODULE:CALLABLE"),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("some_models:no_such", "has no attribute 'no_such'"),
        ("some_models:SIZES", "expected something to call, got dict"),
        ("some_models:text", "expected it to return a model, or a model and an example, got str"),
    ],
)
def test_what_cannot_run(models, source, says, capsys):
    assert command_line.main(["accelerate", source]) == 2
    assert says in capsys.readouterr().err
