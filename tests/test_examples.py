"""The examples run and learn: each in a process of its own, with --quick."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import perceiver_fast

for needed in ("matplotlib", "perceiver_pytorch", "sklearn"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")


def run(name, *arguments, cwd=None):
    # The package under test, also where another one is installed.
    root = str(Path(perceiver_fast.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every example printed, and the folder of its picture; two run at a time, on one thread each."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda name: run(name, "--quick", "--out", "out", cwd=folders[name]), NAMES)
        return {name: (process, folders[name] / "out") for name, process in zip(NAMES, done)}


def test_there_are_examples():
    assert {"audio", "audio_video", "image", "point_cloud", "video"} <= set(NAMES)
    table = (EXAMPLES / "README.md").read_text()
    assert all(f"examples/{name}.py" in table for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_learns_and_draws(name, runs):
    process, folder = runs[name]
    assert process.returncode == 0, process.stderr[-2000:]
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", process.stdout).groups())
    assert last < 0.85 * first
    right, chance = map(float, re.search(r"accuracy: ([\d.]+)% \(guessing: ([\d.]+)%\)", process.stdout).groups())
    assert right > 1.5 * chance, process.stdout
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_image_shows_the_same_losses(runs):
    differences = re.findall(r"│ +([+-]\d+e[+-]\d+)", runs["image"][0].stdout)
    assert len(differences) == 5 and all(abs(float(d)) < 1e-4 for d in differences)


def test_help():
    process = run("image", "--help")
    assert process.returncode == 0 and "--quick" in process.stdout
