"""The examples run and learn: each in a process of its own, with --quick. Training that is interrupted and resumed."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
from warm_python import python

import perceiver_fast

for needed in ("matplotlib", "perceiver_pytorch", "sklearn"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PICTURES = {
    "train": "train",
    "classify": "attention-image",
    "video": "attention-video",
    "audio": "attention-audio",
    "point_cloud": "attention-points",
    "audio_video": "attention-multimodal",
    "shapes": "shapes",
    "image": "image",
}
LAUNCHED = ("distributed", "stream")  # under torchrun (tests/distributed), and without a picture
AUTOENCODERS = ("shapes", "image")  # whose accuracy is no share of labels
IMPORTED = ("torch._dynamo", "matplotlib.figure", "sklearn.datasets")  # by most of them; Adam takes torch._dynamo
OPTIONS = {"train": ["--compare", "20"]}


def run(name, *arguments, cwd=None):
    # The package under test, also where another one is installed.
    root = str(Path(perceiver_fast.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path}
    return python(EXAMPLES / f"{name}.py", *arguments, cwd=cwd, env=env, imports=IMPORTED)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every example printed, and the folder of its picture."""
    folders = {name: tmp_path_factory.mktemp(name) for name in PICTURES}
    return {
        name: (run(name, "--quick", "--out", "out", *OPTIONS.get(name, []), cwd=folder), folder / "out")
        for name, folder in folders.items()
    }


def test_there_are_examples():
    assert {*PICTURES, *LAUNCHED} == {path.stem for path in EXAMPLES.glob("*.py")} - {"common"}
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"examples/{name}.py" in table for name in (*PICTURES, *LAUNCHED))


def test_stream(tmp_path):
    """An image on a disk; the logits are the tensor's."""
    text = run("stream", "--quick", "--size", "512", "--folder", str(tmp_path), cwd=tmp_path).stdout
    difference = float(re.search(r"tensor's logits: ([\d.e+-]+)", text).group(1))
    assert 0 < difference < 1e-5 and "training step" in text and not list(tmp_path.glob("*/image"))


def test_pictures_of_the_docs_are_small():
    docs = EXAMPLES.parent / "docs"
    shown = re.findall(r"\]\((pictures/attention-[a-z]+\.png)\)", (docs / "attention.md").read_text())
    assert {Path(name).stem for name in shown} == set(PICTURES.values()) - {"train", *AUTOENCODERS}
    decoded = [f"pictures/{name}.png" for name in AUTOENCODERS]
    assert all(f"({name})" in (docs / "decoders.md").read_text() for name in decoded)
    assert all((docs / name).stat().st_size < 200_000 for name in [*shown, *decoded])


@pytest.mark.parametrize("name", PICTURES)
def test_learns_and_draws(name, runs):
    process, folder = runs[name]
    assert process.returncode == 0, process.stderr[-2000:]
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", process.stdout).groups())
    assert last < 0.85 * first
    assert (folder / f"{PICTURES[name]}.png").read_bytes().startswith(b"\x89PNG")
    if name in AUTOENCODERS:
        return
    right, chance = map(float, re.search(r"accuracy: ([\d.]+)% \(guessing: ([\d.]+)%\)", process.stdout).groups())
    assert right > 1.5 * chance, process.stdout


def test_autoencoders_say_how_well_they_do(runs):
    shapes, folder = runs["shapes"]
    assert re.search(r"accuracy: [\d.]+% \(guessing: [\d.]+%\); new solids overlap by [\d.]+%", shapes.stdout)
    numpy = pytest.importorskip("numpy")
    field = numpy.load(folder / "shapes.npy")
    assert field.shape == (4, 16, 16, 16, 1) and field.min() < 0 and numpy.isfinite(field).all()
    decibels = re.search(r"accuracy: ([\d.]+) dB .* \(their mean colour: ([\d.]+) dB\)", runs["image"][0].stdout)
    assert float(decibels[1]) > 15.0


def test_solids_are_what_their_formulas_say(example):
    """Points of the surface are at distance zero; a distance grows by no more than the way gone."""
    shapes_of = example("shapes")
    torch.manual_seed(0)
    shapes = shapes_of.Shapes(40)
    surface = shapes.surface(64)
    assert shapes.distance(surface).abs().max() < 0.02
    a, b = torch.rand(2, 40, 500, 3) * 2 - 1
    assert ((shapes.distance(a) - shapes.distance(b)).abs() <= (a - b).norm(dim=-1) + 1e-5).all()
    (points, asked), inside = shapes_of.draw(8)
    assert points.shape == (8, 256, 3) and asked.shape == (8, 256, 3) and 0.1 < inside.mean() < 0.7


def test_tiles_of_an_image_come_together_again(example):
    image_of = example("image")
    image = torch.rand(50, 70, 3) * 2 - 1
    joined = image_of.joined(image_of.tiles(image, 3, 4), 3)
    torch.testing.assert_close(joined, (image[:48, :64] + 1) / 2)


def test_train_shows_the_same_losses(runs):
    differences = re.findall(r"│ +([+-]\d+e[+-]\d+)", runs["train"][0].stdout)
    assert len(differences) >= 5 and all(abs(float(d)) < 1e-4 for d in differences)


def test_classify_says_that_it_trains_first(runs):
    assert "no checkpoint at out/train.pt" in runs["classify"][0].stdout


@pytest.fixture
def example(monkeypatch):
    """Imports an example, with those it imports."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_help(example, capsys):
    for name, option in (
        ("train", "--checkpoint"),
        ("classify", "--checkpoint"),
        ("shapes", "--size"),
        ("image", "--steps"),
    ):
        with pytest.raises(SystemExit) as done:
            example(name).main(["--help"])
        shown = capsys.readouterr().out
        assert done.value.code == 0 and "--quick" in shown and option in shown


def checkpoint(folder):
    return torch.load(folder / "train.pt", weights_only=True)


SHORT = ["--steps", "12", "--every", "5", "--compare", "9"]


def test_resumed_training_is_the_same_to_the_last_bit(example, tmp_path, capsys):
    train = example("train")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*SHORT, "--out", str(whole)]) == 0
    assert train.main([*SHORT, "--out", str(parts), "--stop-at", "8"]) == 0
    assert "stopped after step 8; --resume goes on from the checkpoint, of step 5" in capsys.readouterr().out
    assert checkpoint(parts)["step"] == 5
    torch.manual_seed(123)  # another process has other random numbers
    assert train.main([*SHORT, "--out", str(parts), "--resume"]) == 0
    assert "resumed after step 5 of 12" in capsys.readouterr().out

    expected, actual = checkpoint(whole), checkpoint(parts)
    for name, count in ((train.OURS, 12), (train.THEIRS, 9)):
        a, b = expected["learners"][name], actual["learners"][name]
        assert len(a["losses"]) == count and a["losses"] == b["losses"]
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    assert torch.equal(expected["rng"], actual["rng"])
    differences = [a - b for a, b in zip(*(expected["learners"][n]["losses"] for n in (train.OURS, train.THEIRS)))]
    assert max(map(abs, differences)) < 1e-4


def test_interrupted_training_can_be_resumed(example, tmp_path, capsys, monkeypatch):
    train = example("train")
    advance = train.Training.advance

    def interrupted(training):
        if training.step == 7:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(train.Training, "advance", interrupted)
    assert train.main([*SHORT, "--out", str(tmp_path)]) == 1
    assert "interrupted" in capsys.readouterr().out and checkpoint(tmp_path)["step"] == 5
    monkeypatch.setattr(train.Training, "advance", advance)
    assert train.main([*SHORT, "--out", str(tmp_path), "--resume"]) == 0
    assert checkpoint(tmp_path)["step"] == 12


def test_a_checkpoint_is_never_half_written(example, tmp_path, monkeypatch):
    train = example("train")
    training, path = train.Training(steps=3, compare=0, seed=0), tmp_path / "train.pt"
    training.write(path)

    def half(state, file):
        file.write(b"half")
        raise OSError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        training.advance()
        with pytest.raises(OSError, match="full"):
            training.write(path)
    assert checkpoint(tmp_path)["step"] == 0
    training.write(path)
    assert checkpoint(tmp_path)["step"] == 1


def test_what_cannot_be_resumed(example, tmp_path, capsys):
    train = example("train")
    train.Training(steps=12, compare=9, seed=0).write(tmp_path / "train.pt")
    assert train.main([*SHORT, "--out", str(tmp_path), "--seed", "1", "--resume"]) == 2
    assert "was written with seed=0; give the same" in capsys.readouterr().err
    assert train.main([*SHORT, "--out", str(tmp_path / "nowhere"), "--resume"]) == 2
    assert "cannot resume" in capsys.readouterr().err
    whole = (tmp_path / "train.pt").read_bytes()
    torch.save({"weights": 1}, tmp_path / "other.pt")
    for content, message in (
        (b"something", "is no checkpoint, or damaged"),
        (whole[: len(whole) // 2], "is no checkpoint, or damaged"),
        (b"", "is no checkpoint, or damaged"),
        ((tmp_path / "other.pt").read_bytes(), "a checkpoint of something else"),
    ):
        (tmp_path / "train.pt").write_bytes(content)
        assert train.main([*SHORT, "--out", str(tmp_path), "--resume"]) == 2
        assert message in capsys.readouterr().err


def test_classify_takes_the_checkpoint(example, tmp_path, capsys):
    train, classify = example("train"), example("classify")
    train.Training(steps=1, compare=0, seed=0).write(tmp_path / "train.pt")
    assert classify.main(["--out", str(tmp_path), "--digits", "3"]) == 0
    shown = capsys.readouterr().out
    assert "training quickly" not in shown and "Probabilities" in shown and "differ by at most" in shown
    assert (tmp_path / "attention-image.png").read_bytes().startswith(b"\x89PNG")
    assert classify.main(["--checkpoint", str(tmp_path / "none.pt"), "--out", str(tmp_path)]) == 2
    assert "cannot load the checkpoint" in capsys.readouterr().err


def test_classify_notices_a_model_that_says_something_else(example, tmp_path, capsys, monkeypatch):
    train, classify = example("train"), example("classify")
    train.Training(steps=1, compare=0, seed=0).write(tmp_path / "train.pt")
    monkeypatch.setattr(classify, "AGREE", 0.0)
    assert classify.main(["--out", str(tmp_path), "--digits", "1"]) == 1
