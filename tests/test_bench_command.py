"""The bench command finds the benchmarks and hands its options on; nothing is measured."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from perceiver_fast import installation
from perceiver_fast.__main__ import main
from perceiver_fast.commands import bench

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def calls(monkeypatch):
    """What would have run: modules and their arguments; each returns 1."""
    found = []

    def load(name):
        return SimpleNamespace(main=lambda arguments: found.append((name, arguments)) or 1)

    monkeypatch.setattr(bench, "importlib", SimpleNamespace(import_module=load))
    monkeypatch.setattr(bench, "find_root", lambda: ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return found


@pytest.mark.parametrize(
    ("arguments", "module", "handed"),
    [
        ([], "benchmarks.__main__", []),
        (["--quick", "--threads", "1"], "benchmarks.__main__", ["--quick", "--threads", "1"]),
        (["--only", "not (sdpa or compile)"], "benchmarks.__main__", ["--only", "not (sdpa or compile)"]),
        (["--base", "HEAD~3", "--quick"], "benchmarks.base.__main__", ["HEAD~3", "--quick"]),
        (
            ["--quick", "--base=main", "--pass", "step"],
            "benchmarks.base.__main__",
            ["main", "--quick", "--pass", "step"],
        ),
        (["--compare", "a.json", "b.json", "--fail"], "benchmarks.compare", ["a.json", "b.json", "--fail"]),
        (["--threshold", "0.2", "--compare", "a", "b"], "benchmarks.compare", ["a", "b", "--threshold", "0.2"]),
        (["--base", ""], "benchmarks.base.__main__", [""]),  # as an empty variable of a script is handed on
        (["--scaling", "--axis", "tokens"], "benchmarks.scaling.__main__", ["--axis", "tokens"]),
        (["--scaling", "--help"], "benchmarks.scaling.__main__", ["--help"]),
        (["--base", "HEAD", "-h"], "benchmarks.base.__main__", ["HEAD", "--help"]),
    ],
)
def test_options_are_handed_on(calls, arguments, module, handed):
    assert main(["bench", *arguments]) == 1
    assert calls == [(module, handed)]


def test_one_thing_at_a_time(calls, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "--base", "HEAD", "--scaling"])
    assert stopped.value.code == 2 and "not allowed with argument" in capsys.readouterr().err and not calls


def test_help_shows_all_options(capsys):
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--base REV", "--compare OLD NEW", "--scaling", *bench.SUITE_OPTIONS):
        assert option in shown


def test_help_has_the_options_of_the_suite(monkeypatch):
    pytest.importorskip("perceiver_pytorch")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks.__main__ import parser

    taken = {option for action in parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert taken == {option.split()[0] for option in bench.SUITE_OPTIONS}


def test_quick_keeps_nothing_unless_asked(monkeypatch, tmp_path, capsys):
    pytest.importorskip("perceiver_pytorch")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    from benchmarks import __main__ as suite

    paths = []
    result = {"conditions": {"load_at_start": 0}, "rows": [1], "missing": []}
    monkeypatch.setattr(suite, "collect", lambda args, geometries, path: paths.append(path) or (0, result))
    monkeypatch.setattr(suite, "show", lambda console, result: None)
    assert suite.main(["--quick"]) == 0 and "--json PATH keeps them" in capsys.readouterr().out
    assert suite.main(["--quick", "--json", str(tmp_path / "kept.json")]) == 0
    assert suite.main(["--geometry", "small"]) == 0
    assert paths[:2] == [None, tmp_path / "kept.json"] and paths[2].parent == ROOT / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(["--base", "HEAD"], "--rounds"), (["--compare", "a", "b"], "--markdown"), (["--scaling"], "--redraw")],
)
def test_help_of_a_mode(monkeypatch, capsys, mode, expected):
    pytest.importorskip("perceiver_pytorch")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *mode, "--help"])
    assert stopped.value.code == 0 and expected in capsys.readouterr().out


def test_without_the_repository(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site-packages/perceiver_fast")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__main__.py").touch()  # somebody else's
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick"]) == 2
    captured = capsys.readouterr()
    assert "clone the repository, and run this command in its folder" in captured.err and not captured.out
    assert main(["bench", "--help"]) == 0
    captured = capsys.readouterr()
    assert "--scaling" in captured.out and "clone the repository" in captured.err


def test_the_current_directory_may_hold_them(tmp_path, monkeypatch):
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site-packages/perceiver_fast")
    monkeypatch.chdir(ROOT)
    assert bench.find_root() == ROOT


def test_what_is_not_installed_is_named(calls, monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'psutil'", name="psutil")

    monkeypatch.setattr(bench.importlib, "import_module", missing)
    assert main(["bench"]) == 2
    assert "needs psutil, which is not installed: pip install -e '.[bench]'" in capsys.readouterr().err


def test_a_broken_benchmark_is_no_missing_package(calls, monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'benchmarks.gone'", name="benchmarks.gone")

    monkeypatch.setattr(bench.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.gone"):
        main(["bench"])
