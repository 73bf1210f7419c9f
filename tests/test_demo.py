"""The demo end to end on a small photograph, and what it says when something does not fit, fails or is missing."""

from __future__ import annotations

import argparse
import importlib.util
import json

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
pytest.importorskip("perceiver_pytorch")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

from perceiver_fast import extension
from perceiver_fast.__main__ import main
from perceiver_fast.commands import demo, demo_process

TINY = {"num_freq_bands": 2, "max_freq": 4.0, "depth": 1, "num_latents": 8, "latent_dim": 16, "self_per_cross_attn": 1}


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    """The demo sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """Every model of the demo is a small one."""
    for name in demo.GEOMETRIES:
        monkeypatch.setitem(demo.GEOMETRIES, name, demo.GEOMETRIES[name] | TINY)


@pytest.fixture
def task(tmp_path):
    """A folder with a task of a small model."""
    arguments = demo.GEOMETRIES["readme"] | TINY
    demo_process.write_task(tmp_path, arguments, demo.initial_weights(arguments), torch.rand(1, 4, 5, 3), 1, 1)
    return tmp_path


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.GEOMETRIES, "readme", demo.GEOMETRIES["readme"] | {"depth": 2})  # time to make weights
    monkeypatch.setitem(
        demo.GEOMETRIES, "imagenet-lucid-1", demo.GEOMETRIES["imagenet-lucid-1"] | TINY
    )  # of the picture
    stored = tmp_path / "new" / "rows.json"
    options = ["--max-side", "48", "--repeats", "1", "--geometry", "readme"]
    assert main(["demo", *options, "--threads", "2", "--out", str(tmp_path), "--json", str(stored)]) == 0

    result = json.loads(stored.read_text())
    original, fast = result["rows"]
    assert (original["model"], fast["model"]) == ("perceiver-pytorch", "perceiver-fast")
    assert 0 <= fast["max_relative_difference"] < 1e-3
    assert fast["speedup"] == pytest.approx(original["seconds"] / fast["seconds"])
    assert sum(fast["paths"].values()) == 2 * 3
    conditions = result["conditions"]
    assert (conditions["tokens"], conditions["threads"], conditions["dtype"]) == (48 * 32, 2, "float32")

    with Image.open(tmp_path / "attention.png") as picture:
        picture.load()
        assert min(picture.size) > 300
    printed = capsys.readouterr().out
    assert "readme: perceiver-fast: repeat 1 of 1" in printed
    assert "2 x grid_attention on" in printed
    assert "1,536 tokens" in printed


def test_original_that_does_not_fit_is_not_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_process, "available_memory", lambda: 10**6)
    options = ["--max-side", "24", "--repeats", "1", "--geometry", "readme", "--out", str(tmp_path)]
    assert main(["demo", *options, "--json", str(tmp_path / "rows.json")]) == 0
    original, fast = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert original["note"].startswith("needs about ") and original["note"].endswith("0.0 GB free: not run")
    assert original["seconds"] is None and fast["seconds"] > 0 and fast["speedup"] is None
    printed = capsys.readouterr().out
    assert "needs about" in printed and "GB free: not run" in printed


@pytest.mark.parametrize("depth", [1, 2])
def test_estimate_is_what_pytorch_allocates(depth):
    """The peak over PyTorch's own account of its memory, which knows nothing of library code and thread stacks."""
    import perceiver_pytorch

    arguments = demo.GEOMETRIES["readme"] | {
        "depth": depth,
        "latent_dim": 32,
        "num_latents": 64,
        "self_per_cross_attn": 1,
    }
    model, data = perceiver_pytorch.Perceiver(**arguments).eval(), torch.rand(1, 100, 120, 3)
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.inference_mode(), profile:
        model(data)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert demo_process.original_bytes(arguments, (100, 120)) == pytest.approx(peak, rel=0.02)


def test_peak_memory_is_that_of_the_forward(tmp_path):
    arguments = demo.GEOMETRIES["readme"] | TINY | {"num_latents": 256}
    data = torch.rand(1, 300, 400, 3)
    demo_process.write_task(tmp_path, arguments, demo.initial_weights(arguments), data, 1, 2)
    added = demo_process.run("perceiver_pytorch", tmp_path, lambda line: None)["peak_bytes_added"]
    if added is None:
        pytest.skip("the system does not tell peak memory")
    estimate = demo_process.original_bytes(arguments, (300, 400))  # 0.3 GB
    assert 0.95 * estimate < added < estimate + 300e6  # and what libraries touch at their first call


def test_weights_are_the_same(tiny, monkeypatch):
    arguments = demo.GEOMETRIES["readme"]
    original = demo.initial_weights(arguments)
    monkeypatch.setattr(demo, "_installed", lambda module: module != "perceiver_pytorch")
    fast = demo.initial_weights(arguments)
    assert original.keys() == fast.keys()
    assert all(torch.equal(original[name], fast[name]) for name in original)


@pytest.mark.parametrize(
    "body, message",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, most likely out of memory"),
        ("raise MemoryError('no more')", "failed with exit code 1: MemoryError: no more"),
    ],
)
def test_a_failed_process_becomes_a_row(body, message, task, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(f"def Perceiver(**arguments):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(demo_process.MeasureError) as failure:
        demo_process.run("broken", task, lambda line: None)
    assert str(failure.value) == message

    def fail(*args):
        raise failure.value

    monkeypatch.setattr(demo_process, "run", fail)
    row, output = demo._row("readme", "perceiver_fast", task, torch.zeros(1, 4, 5, 3), 0, lambda line: None)
    assert (row["note"], row["seconds"], output) == (message, None, None)
    assert not demo._sound(row)
    conditions = demo.describe_conditions(None, torch.zeros(1, 4, 5, 3), 1, 1)
    demo.show(demo.Console(width=200), [row], conditions)
    assert message in capsys.readouterr().out


def test_without_the_original_its_rows_are_dropped(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_installed", lambda module: module != "perceiver_pytorch")
    monkeypatch.setattr(extension, "error", "the C++ extension was not built")
    options = ["--max-side", "24", "--repeats", "1", "--geometry", "readme", "--out", str(tmp_path)]
    assert main(["demo", *options, "--json", str(tmp_path / "rows.json")]) == 0
    assert [row["model"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["perceiver-fast"]
    printed = capsys.readouterr().out
    assert "perceiver-pytorch is not installed" in printed and demo.INSTALL in printed
    assert "THE C++ KERNELS DO NOT RUN" in printed and "the C++ extension was not built" in printed


def test_missing_packages_are_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find_spec(name))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f"demo: needs scikit-learn: {demo.INSTALL}\n"


def test_unreadable_photograph(tmp_path, capsys):
    (tmp_path / "photo.png").write_text("no picture")
    assert main(["demo", "--image", str(tmp_path / "photo.png")]) == 2
    assert main(["demo", "--image", str(tmp_path / "missing.png")]) == 2
    assert capsys.readouterr().err.count("demo: ") == 2


def test_other_photographs(tmp_path):
    Image.new("RGBA", (30, 20), (255, 0, 0, 255)).save(tmp_path / "red.png")
    photo = demo.load_photo(tmp_path / "red.png", max_side=15)
    assert photo.shape == (1, 10, 15, 3) and photo.dtype == torch.float32
    assert photo[0, 0, 0].tolist() == [1, 0, 0]
    assert demo.load_photo(None).shape == (1, 427, 640, 3)


def test_help_names_every_option():
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    text = parser.format_help()
    for option in ("--image", "--out", "--repeats", "--threads", "--geometry", "--max-side", "--json"):
        assert option in text
    assert all(action.help for action in parser._actions)
    with pytest.raises(SystemExit):
        parser.parse_args(["--repeats", "0"])
