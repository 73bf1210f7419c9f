"""Two revisions side by side, on a small repository without C++ kernels: real worktrees and processes, tiny models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

pytest.importorskip("perceiver_pytorch")

from benchmarks import statistic
from benchmarks.base import __main__ as base
from benchmarks.base import measure as base_measure
from benchmarks.base import tree as base_tree
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.geometries import GEOMETRIES

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
BUILD = "import sys\nprint('building', *sys.argv[1:])\n"


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(folder, message):
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", message)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout of this package with one commit, pure Python, which ``base`` takes for its own."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json", "kernels")
    shutil.copytree(ROOT / "perceiver_fast", folder / "perceiver_fast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=ignored)
    (folder / "setup.py").write_text(BUILD)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path, "init", "-q", str(folder))
    commit(folder, "one")
    monkeypatch.setattr(base, "ROOT", folder)
    monkeypatch.setenv("PERCEIVER_FAST_SKIP_BUILD", "1")
    for name in ("cross-only", "points", "io-32"):
        monkeypatch.setitem(GEOMETRIES, name, GEOMETRIES[name].tiny())
    return folder


def leftovers(folder):
    return git(folder, "worktree", "list", "--porcelain").count("worktree ") - 1


@needs_git
def test_two_revisions_of_all_families(repository, tmp_path, capfd):
    """The new side's output is doubled, and not committed: it is another result, and the tree is dirty."""
    with (repository / "perceiver_fast/__init__.py").open("a") as package:
        package.write("_forward = Perceiver.forward\nPerceiver.forward = lambda *a, **k: 2 * _forward(*a, **k)\n")
    stored = tmp_path / "new" / "result.json"
    names = ["--geometry", "cross-only", "--geometry", "points", "--geometry", "io-32"]
    assert base.main(["HEAD", *names, "--rounds", "6", "--threads", "1", "--json", str(stored)]) == 1

    result = json.loads(stored.read_text())
    assert [(row["geometry"], row["pass"]) for row in result["rows"]] == [
        (name, pass_name) for name in names[1::2] for pass_name in ("forward", "step")
    ]
    assert result["missing"] == [] and result["new"]["dirty"] and result["base"]["commit"] == result["new"]["commit"]
    for row in result["rows"]:
        same = row["geometry"] == "io-32"  # which is no Perceiver
        assert row["same_results"] == same and row["output_difference"] == pytest.approx(0.0 if same else 1.0)
        assert (row["gradient_difference"] is None) == (row["pass"] == "forward")
        for side in ("base", "new"):
            assert 0 < row[side]["min"] <= row[side]["q1"] <= row[side]["median"] <= row[side]["q3"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["verdict"] in ("slower", "same", "faster")
    captured = capfd.readouterr()
    for expected in ("base runs without the C++ kernels", "its changes are part of the new side", "other results"):
        assert expected in captured.out
    assert "building HEAD" in captured.err and "cross-only forward float32" in captured.err
    assert leftovers(repository) == 0


@needs_git
def test_a_side_that_cannot_is_named(repository, capfd):
    """The base has no PerceiverIO; nothing else is asked for, so nothing was measured. JSON is all that is printed."""
    package = repository / "perceiver_fast/__init__.py"
    text = package.read_text()
    package.write_text(text + "\ndel PerceiverIO\n")
    commit(repository, "two")
    package.write_text(text)
    commit(repository, "three")
    options = ["--geometry", "io-32", "--pass", "forward", "--rounds", "6", "--json", "-"]
    assert base.main(["HEAD~1", *options]) == 2
    captured = capfd.readouterr()
    (missing,) = json.loads(captured.out)["missing"]
    assert missing["reason"].startswith("base: AttributeError") and "nothing could be measured: base:" in captured.err


@needs_git
@pytest.mark.parametrize(
    ("revision", "expected"),
    [("no-such", "expected a revision of this checkout that has the package, got 'no-such'"), ("--all", "got '--all'")],
)
def test_unknown_revisions(repository, capsys, revision, expected):
    assert base.main(["--", revision]) == 2
    assert expected in capsys.readouterr().err


@needs_git
def test_a_folder_that_is_no_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert base.main(["HEAD"]) == 2
    assert f"expected a git checkout in {tmp_path}, got none: clone" in capsys.readouterr().err


def test_without_git(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert base.main(["HEAD"]) == 2
    assert "git was not found" in capsys.readouterr().err


@needs_git
def test_a_build_that_fails(repository, capsys):
    (repository / "setup.py").write_text(BUILD + "sys.exit('no compiler')\n")
    commit(repository, "two")
    assert base.main(["HEAD"]) == 2
    error = capsys.readouterr().err
    assert "the build of the base failed, exit code 1:" in error and "no compiler" in error
    assert "build_ext --inplace --build-temp" in error
    assert leftovers(repository) == 0


@needs_git
@pytest.mark.parametrize("skip", ["", "1"])
def test_a_build_is_asked_to_fail_rather_than_to_skip(repository, monkeypatch, tmp_path, skip):
    (repository / "setup.py").write_text("import os\nprint(os.environ.get('PERCEIVER_FAST_FORCE_BUILD'))\n")
    monkeypatch.delenv("PERCEIVER_FAST_FORCE_BUILD", raising=False)
    monkeypatch.setenv("PERCEIVER_FAST_SKIP_BUILD", skip)
    printed = []
    base_tree.build(repository, tmp_path / "build", printed.append)
    assert printed == ["None" if skip else "1"]


@needs_git
def test_an_interrupt_leaves_nothing_behind(repository, monkeypatch, capsys):
    trees = []

    def interrupted(tree, folder, say):
        trees.append(tree)
        assert (tree / "perceiver_fast/__init__.py").exists() and leftovers(repository) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "build", interrupted)
    assert base.main(["HEAD"]) == 2
    assert "interrupted" in capsys.readouterr().err
    assert leftovers(repository) == 0 and not trees[0].parent.exists()


@needs_git
def test_the_wrong_package_is_refused(repository, tmp_path, monkeypatch):
    """An installed package is found where the tree has none; the worker says so, and is not measured."""
    monkeypatch.setenv("PYTHONPATH", str(repository))
    (tmp_path / "empty").mkdir()
    expected = "base: ImportError: expected perceiver_fast of .*empty, got"
    with base_measure.Worker("base", tmp_path / "empty", tmp_path / "worker", threads=1) as worker:
        with pytest.raises(base_measure.WorkerError, match=expected):
            worker.ask("facts")


@needs_git
def test_all_of_a_side_is_its_trees(repository, tmp_path):
    """Also the extension, which an installed checkout has and this tree has not."""
    with base_measure.Worker("base", repository, tmp_path / "worker", threads=1) as worker:
        facts = worker.ask("facts")
    assert facts["isa"] is None and "not built" in facts["extension_error"]


def test_a_worker_that_died_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(base_measure, "WORKER", tmp_path / "dies.py")
    (tmp_path / "dies.py").write_text("import sys\nsys.stdin.readline()\nsys.exit('cannot go on')\n")
    with base_measure.Worker("new", tmp_path, tmp_path / "worker", threads=1) as worker:
        for expected in ("new: its process ended with exit code 1: cannot go on", "exit code 1"):
            with pytest.raises(base_measure.WorkerError, match=expected):
                worker.ask("facts")


def test_no_kernels_unless_asked_for(monkeypatch):
    facts = {"base": {"isa": "avx2", "extension_error": None}, "new": {"isa": None, "extension_error": "not built"}}
    monkeypatch.setenv("PERCEIVER_FAST_SKIP_BUILD", "0")
    with pytest.raises(CannotRun, match="new: not built; build it, or set PERCEIVER_FAST_SKIP_BUILD=1"):
        base.warnings(facts, dirty=False)
    monkeypatch.setenv("PERCEIVER_FAST_SKIP_BUILD", "1")
    assert base.warnings(facts, dirty=False)[0] == "new runs without the C++ kernels"


def test_sources_newer_than_the_extension_are_found(tmp_path):
    for name in ("perceiver_fast/_C.so", "csrc/core/a.cpp", "csrc/core/b.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000, 1000))
    assert base_tree.stale_source(tmp_path) is None
    os.utime(tmp_path / "csrc/core/b.h", (2000, 2000))
    assert base_tree.stale_source(tmp_path) == tmp_path / "csrc/core/b.h"
    (tmp_path / "perceiver_fast/_C.so").unlink()
    assert base_tree.stale_source(tmp_path) is None


def test_differences_are_relative_and_keep_nan(tmp_path):
    one = torch.ones(4)
    torch.save({"output": 1.01 * one, "a": one * float("nan")}, tmp_path / "new.pt")
    torch.save({"output": one, "a": one}, tmp_path / "base.pt")
    apart = base_measure.differences(tmp_path)
    assert apart["output_difference"] == pytest.approx(1e-2) and not apart["gradient_difference"] <= 1.0
    torch.save({"output": one, "a": one}, tmp_path / "base.pt")
    torch.save({"output": one, "b": one}, tmp_path / "new.pt")
    with pytest.raises(base_measure.WorkerError, match="differs in \\['a', 'b'\\]"):
        base_measure.differences(tmp_path)


def test_the_interval_of_a_median_is_the_sign_tests():
    with pytest.raises(ValueError, match="at least 6 values, got 5"):
        statistic.median_interval([1.0] * 5)
    assert statistic.median_interval([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == (1.0, 6.0)
    assert statistic.median_interval(list(range(1, 21))) == (6, 15)  # 2 P(Bin(20, 1/2) < 6) = 4.1 %


def test_options_are_checked(capsys):
    for options in (["--rounds", "5"], ["--geometry", "no-such"], ["--batch", "0"]):
        with pytest.raises(SystemExit) as stopped:
            base.main(["HEAD", *options])
        assert stopped.value.code == 2
    assert "expected at least 6, got 5" in capsys.readouterr().err
