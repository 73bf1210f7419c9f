"""The demo end to end on a small photograph, and what it says when something does not fit, fails or is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
psutil = pytest.importorskip("psutil")
pytest.importorskip("perceiver_pytorch")
pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")

from perceiver_fast import extension
from perceiver_fast.__main__ import main
from perceiver_fast.commands import demo, demo_process
from perceiver_fast.insight import peer
from perceiver_fast.insight.geometries import GEOMETRIES

TINY = {"num_freq_bands": 2, "max_freq": 4.0, "depth": 1, "num_latents": 8, "latent_dim": 16, "self_per_cross_attn": 1}


def readme(*sizes, **arguments):
    """The README's model of another grid and other arguments."""
    return replace(GEOMETRIES["readme"], sizes=sizes, model=GEOMETRIES["readme"].model | arguments)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    """The demo sets the number of threads of its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """The demo's models are small, the README's a little less so."""
    for name, geometry in demo.GEOMETRIES.items():
        depth = {"depth": 2} if name == "readme" else {}
        monkeypatch.setitem(demo.GEOMETRIES, name, replace(geometry, model=geometry.model | TINY | depth))


@pytest.fixture
def rows_of(small, tmp_path):
    """Runs the demo, which has to succeed, and gives what it stores."""

    def run(*options):
        stored = tmp_path / "new" / "rows.json"
        options = ("--max-side", "48", "--repeats", "1", "--geometry", "readme", "--out", str(tmp_path), *options)
        assert main(["demo", *options, "--json", str(stored)]) == 0
        return json.loads(stored.read_text())

    return run


def test_end_to_end(rows_of, tmp_path, capsys):
    result = rows_of("--threads", "2")
    original, fast = result["rows"]
    assert (original["model"], fast["model"]) == ("perceiver-pytorch", "perceiver-fast")
    assert 0 <= fast["max_relative_difference"] < 1e-3
    assert fast["speedup"] == pytest.approx(original["seconds"] / fast["seconds"])
    assert sum(fast["paths"].values()) == 2 * 2
    conditions = result["conditions"]
    assert (conditions["tokens"], conditions["threads"], conditions["dtype"]) == (48 * 32, 2, "float32")

    with Image.open(tmp_path / "attention.png") as picture:
        picture.load()
        assert min(picture.size) > 300
    out, err = capsys.readouterr()
    assert "2 x grid_attention on" in out and "1,536 tokens" in out
    assert err.splitlines()[:2] == ["readme: perceiver-pytorch", "readme: perceiver-fast"]


def test_original_that_does_not_fit_is_not_run(rows_of, monkeypatch, capsys):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    original, fast = rows_of()["rows"]
    assert original["note"].startswith("needs about ") and original["note"].endswith("0.0 GB free: not run")
    assert original["seconds"] is None and fast["seconds"] > 0 and fast["speedup"] is None
    printed = capsys.readouterr().out
    assert "needs about" in printed and "GB free: not run" in printed


@pytest.mark.parametrize("depth", [1, 2])
def test_estimate_is_what_pytorch_allocates(depth):
    """The peak over PyTorch's own account of its memory, which knows nothing of library code and thread stacks."""
    geometry = readme(100, 120, depth=depth, latent_dim=32, num_latents=64, self_per_cross_attn=1)
    model, data = peer.peer_model(geometry).eval(), geometry.input()
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.inference_mode(), profile:
        model(data)
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert demo_process.original_bytes(geometry) == pytest.approx(peak, rel=0.02)


def test_peak_memory_is_that_of_the_forward():
    geometry, lines = readme(300, 400, **TINY | {"num_latents": 256}), []
    found = demo_process.measure("perceiver-pytorch", geometry, geometry.input(), 1, 2, lines.append)
    assert lines[0] == "loading" and lines[-1] == "repeat 1 of 1" and len(found["seconds"]) == 1
    if found["peak_bytes_added"] is None:
        pytest.skip("the system does not tell peak memory")
    estimate = demo_process.original_bytes(geometry)  # 0.3 GB
    assert (
        0.95 * estimate < found["peak_bytes_added"] < estimate + 300e6
    )  # and what libraries touch at their first call


def test_weights_are_the_same():
    original, fast = (
        demo_process.build(model, readme(4, 5, **TINY)) for model in ("perceiver-pytorch", "perceiver-fast")
    )
    weights, theirs = fast.state_dict(), original.state_dict()
    assert weights.keys() == theirs.keys() and type(original) is not type(fast)
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)


@pytest.mark.parametrize(
    "body, message",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, most likely out of memory"),
        ("raise MemoryError('no more')", "failed with exit code 1: MemoryError: no more"),
    ],
)
def test_a_failed_process_becomes_a_row(body, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "perceiver_pytorch.py").write_text(f"def Perceiver(**arguments):\n    {body}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(demo.__file__).parents[2]}")
    photo = torch.zeros(1, 4, 5, 3)
    rows = demo.compare(readme(4, 5, **TINY), photo, 1, 1, lambda *line: None)
    assert [(row["note"], row["seconds"] is None, row["speedup"]) for row in rows] == [
        (message, True, None),
        (None, False, None),
    ]
    assert demo._sound(rows[0]) and not demo._sound(rows[0] | {"model": "perceiver-fast"})
    demo.show(demo.Console(width=200), rows, demo.describe_conditions(None, photo, 1, 1))
    assert message in capsys.readouterr().out


def test_without_the_original_its_rows_are_dropped(rows_of, monkeypatch, capsys):
    monkeypatch.setattr(demo, "package_version", lambda name: None)
    monkeypatch.setattr(extension, "error", "the C++ extension was not built")
    assert [row["model"] for row in rows_of()["rows"]] == ["perceiver-fast"]
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
    assert main(["demo", "--out", str(tmp_path / "photo.png")]) == 2
    assert capsys.readouterr().err.count("demo: ") == 3


def test_other_photographs(tmp_path):
    Image.new("RGBA", (30, 20), (255, 0, 0, 255)).save(tmp_path / "red.png")
    photo = demo.load_photo(tmp_path / "red.png", max_side=15)
    assert photo.shape == (1, 10, 15, 3) and photo.dtype == torch.float32
    assert photo[0, 0, 0].tolist() == [1, 0, 0]
    assert demo.load_photo(None).shape == (1, 427, 640, 3)
