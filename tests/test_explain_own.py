"""explain of people's own models: MODULE:CALLABLE, and a class with its arguments and a checkpoint."""

import json
import sys

import pytest
import torch

import perceiver_fast as pf
from perceiver_fast.__main__ import main
from perceiver_fast.commands.own_model import arguments_from, sizes_from
from perceiver_fast.insight import roofs
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.roofs import Roofs

SIZES = dict(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8, num_classes=3)
TYPED = ", ".join(f"{name}={value}" for name, value in SIZES.items())
SOURCE = f"""
import perceiver_fast as pf
import torch


def model():
    return pf.Perceiver(**{SIZES})


def with_tensor():
    return model(), torch.randn(2, 6, 5, 3)


def with_tuple():
    return model(), (torch.randn(2, 6, 5, 3), torch.ones(2, 6, 5, dtype=torch.bool))


def with_keywords():
    return model(), dict(data=torch.randn(2, 6, 5, 3))


def within():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.perceiver = model()

        def forward(self, image, scale=1.0):
            return self.perceiver(image * scale)

    return Mine(), dict(scale=2.0, image=torch.randn(2, 6, 5, 3))


def wrong():
    return model(), dict(image=1)


def other():
    return torch.nn.Linear(2, 2), torch.randn(1, 2)
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Roofs without a second of measuring."""
    monkeypatch.setattr(roofs, "measure_roofs", lambda threads: Roofs(1e10, 1e9, 2e9, 1))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module of models in the current folder, whose name is returned."""
    (tmp_path / "explained_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "explained_models"
    sys.modules.pop("explained_models", None)


@pytest.mark.parametrize("name", ["with_tensor", "with_tuple", "with_keywords"])
def test_a_model_and_an_example(models, name, capsys):
    assert main(["explain", f"{models}:{name}"]) == 0
    shown = capsys.readouterr().out
    assert f"{models}:{name} (Perceiver)" in shown and "layers.0.cross_attn" in shown
    assert "6 x 5 tokens of 13 channels; batch 2" in shown


def test_a_model_that_holds_one_of_ours(models, capsys):
    assert main(["explain", f"{models}:within", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == f"{models}:within" and found["class"] == "Mine" and found["shapes"] == [[2, 6, 5, 3]]
    assert "perceiver.layers.0.cross_attn" in [layer["layer"] for layer in found["layers"]]


def test_a_model_alone_takes_a_shape(models, capsys):
    assert main(["explain", f"{models}:model", "--shape", "7x6x3", "--batch", "3"]) == 0
    assert "7 x 6 tokens of 13 channels; batch 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, says",
    [
        (["{}:model"], "returns a model without an example: expected --shape too"),
        (["{}:model", "--shape", "7x6"], "expected data of 4 dimensions"),
        (["{}:model", "--shape", "7x6"], "--shape 7x6 is one input's, without the batch"),
        (["{}:with_tensor", "--shape", "6x5x3"], "expected no --shape beside it"),
        (["{}:with_tensor", "--batch", "2"], "expected no --batch beside it"),
        (["{}:with_tensor", "--dtype", "float64"], "expected no --dtype; change it there"),
        (["{}:with_tensor", "--checkpoint", "a.pt"], "--checkpoint goes with --arguments, got it with MODULE:CALLABLE"),
        (["{}:with_tensor", "--geometry", "readme"], "got MODULE:CALLABLE and --geometry"),
        (["{}:wrong"], "the example does not fit Perceiver.forward: missing a required argument: 'data'"),
        (
            ["{}:other"],
            "explain: expected a perceiver_fast model, got Linear; models of other libraries: perceiver-fast acc",
        ),
        (["{}"], "expected MODULE:CALLABLE"),
    ],
)
def test_what_cannot_be_explained(models, options, says, capsys):
    assert main(["explain", *(option.format(models) for option in options)]) == 2
    assert says in capsys.readouterr().err


def saved(folder, dtype, wrap=lambda state: state):
    path = folder / "weights.pt"
    torch.save(wrap(pf.Perceiver(**SIZES).to(dtype).state_dict()), path)
    return str(path)


def ddp(state):
    return {"epoch": 3, "model_state_dict": {f"module.{key}": value for key, value in state.items()}}


@pytest.mark.parametrize("wrap", [dict, ddp])
def test_arguments_and_a_checkpoint(tmp_path, wrap, capsys):
    path = saved(tmp_path, torch.float64, wrap)
    options = ["explain", "--arguments", TYPED, "--shape", "9x8x3", "--batch", "2", "--checkpoint", path]
    assert main(options) == 0
    shown = capsys.readouterr().out
    assert "Perceiver (with the weights of weights.pt" in shown and "float64 on cpu" in shown
    assert main([*options, "--json", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["arguments"], found["sizes"], found["batch"]) == (SIZES, [9, 8, 3], 2)
    assert found["dtype"] == "float32" and found["checkpoint"] == path


def test_another_class_in_json(tmp_path, capsys):
    (tmp_path / "arguments.json").write_text('{"depth": 2, "dim": 8, "queries_dim": 4, "num_latents": 4}')
    options = ["--class", "PerceiverIO", "--arguments", str(tmp_path / "arguments.json"), "--shape", "30x8"]
    assert main(["explain", *options]) == 0
    assert "cross_attend_block" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, says",
    [
        (["--arguments", TYPED], "expected --shape with --arguments"),
        (["--arguments", TYPED, "--shape", "6xa"], "expected --shape to be sizes such as 224x224x3, got '6xa'"),
        (
            ["--arguments", "depth=", "--shape", "6x6x3"],
            "expected --arguments to be 'depth=6, num_latents=256, ..', JSON",
        ),
        (["--arguments", "depth=1", "--shape", "6x6x3"], "missing 2 required keyword-only arguments: 'num_freq_bands'"),
        (["--arguments", "deep=1", "--shape", "6x6x3"], "there is no argument deep. It takes num_freq_bands, depth"),
        (["--arguments", "none.json", "--shape", "6x6x3"], "No such file or directory: 'none.json'"),
        (["--checkpoint", "weights.pt"], "--checkpoint needs the constructor's --arguments"),
        (["--geometry", "readme", "--shape", "6x6x3"], "has an input of its own: expected no --shape"),
        (["--geometry", "readme", "--class", "PerceiverIO"], "--class goes with --arguments, got it with --geometry"),
    ],
)
def test_arguments_that_are_wrong(options, says, capsys):
    assert main(["explain", *options]) == 2
    assert says in capsys.readouterr().err


def test_checkpoints_that_are_wrong(tmp_path, capsys):
    options = ["explain", "--arguments", TYPED, "--shape", "6x6x3", "--checkpoint"]
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save(pf.Perceiver(**SIZES), tmp_path / "whole.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("nothing")
    for name, says in {
        "other.pt": 'is not of a model with these --arguments: Missing key(s) in state_dict: "latents"',
        "whole.pt": "expected a file that torch.save(model.state_dict(), ..) wrote, got another file, or one of more",
        "list.pt": "expected a file that torch.save(model.state_dict(), ..) wrote, got list",
        "text.pt": "expected a file that torch.save(model.state_dict(), ..) wrote, got another file",
        "missing.pt": "No such file or directory",
    }.items():
        assert main([*options, str(tmp_path / name)]) == 2, name
        told = capsys.readouterr().err
        assert says in told and "weights_only" not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_torch_cannot_run_on_a_gpu_that_is_not_there(capsys):
    options = ["--class", "gated.Perceiver", "--arguments", TYPED, "--shape", "6x6x3", "--device", "cuda"]
    assert main(["explain", *options]) == 2
    assert "torch cannot run on a GPU that is not there" in capsys.readouterr().err


def test_what_is_typed():
    assert arguments_from("a=1, b=[2, 3], c=true, d='x', e=None") == dict(a=1, b=[2, 3], c=True, d="x", e=None)
    assert arguments_from("") == {} and arguments_from('{"a": 1.5}') == {"a": 1.5}
    for text in ("1", "a", "a=b", "{1}", "a=__import__('os')", "**{}"):
        with pytest.raises(CannotRun, match="expected --arguments"):
            arguments_from(text)
    assert sizes_from("224x224x3") == sizes_from("224,224,3") == sizes_from("(224, 224, 3)") == (224, 224, 3)
    assert sizes_from("30") == (30,)
    for text in ("", "x", "3x", "0x3", "-1"):
        with pytest.raises(CannotRun, match="expected --shape"):
            sizes_from(text)
