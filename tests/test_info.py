"""What info collects and shows, also of an installation that is broken."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support import needs_extension
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import extension
from perceiver_fast.__main__ import main
from perceiver_fast.insight import environment, roofs
from perceiver_fast.insight.roofs import Roofs
from perceiver_fast.ops import library, linear_choice
from perceiver_fast.ops.declaration import OPS

PACKAGE = Path(pf.__file__).parent


@pytest.mark.skipif(**needs_extension)
def test_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perceiver_fast"] == pf.__version__ and found["torch"] == torch.__version__
    assert found["problems"] == [] and found["extension"]["active_isa"] in found["extension"]["available_isas"]
    assert (
        found["backends"]["grid_attention"]["cpu"] | {"reference": [], "cpu": []}
        == found["backends"]["grid_attention"]["cpu"]
    )
    assert found["cuda_kernels"]["loaded"] == (extension.cuda_error is None)
    assert found["cuda_kernels"].get("reason") == extension.cuda_error
    assert found["packages"]["perceiver-pytorch"] and "rich" in found["packages"]
    assert found["linear"]["forced"] == "auto"
    for name, compared in found["linear"]["compared"].items():
        assert compared["chosen"] == linear_choice.verdict(name).chosen and compared["how"] in compared["text"]
    assert "roofs" not in found
    if torch.version.cuda is None:
        assert "is not a CUDA build" in extension.cuda_error or "not built" in extension.cuda_error


@pytest.mark.skipif(**needs_extension)
def test_as_tables(capsys, monkeypatch):
    monkeypatch.setenv("PERCEIVER_FAST_SKIP_BUILD", "1")
    monkeypatch.setenv("HOME_OF_SOMETHING", "else")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "DOES NOT LOAD" not in shown
    for title in ("Versions", "Machine", "C++ kernels", "Environment variables"):
        assert title in shown
    assert "active isa" in shown and "PERCEIVER_FAST_SKIP_BUILD" in shown and "HOME_OF_SOMETHING" not in shown
    rows = [line.split() for line in shown.splitlines()]
    for op in OPS:
        assert any(row[:2] == [op, "cpu"] for row in rows)
    for name in linear_choice.COMPARISONS:
        assert f"{name.replace('_', ' ')} " in shown and str(linear_choice.verdict(name)) in shown
    assert max(map(len, shown.splitlines())) > 100  # verdicts are not broken into pieces


def with_gpus(monkeypatch, *names):
    """A machine with these GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])


def test_without_a_gpu_nothing_is_said_of_what_only_gpus_need(monkeypatch, capsys):
    with_gpus(monkeypatch)
    monkeypatch.setattr(library, "triton_error", "triton is not installed (pip install triton)")
    monkeypatch.setattr(environment, "package_version", lambda name: None if name == "triton" else "1.0")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "triton" not in shown and "cuda" not in shown.lower().replace("is not a cuda build", "")
    assert "There is no GPU" in shown and "--json has it" in shown
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["grid_attention"]["cuda"]["triton"]


def test_equal_reasons_are_one_line(monkeypatch, capsys):
    with_gpus(monkeypatch, "H100")
    monkeypatch.setattr(library, "triton_error", "triton is not installed (pip install triton)")
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "not triton on cuda" in line]
    with_triton = [name for name, op in OPS.items() if any(backend.name == "triton" for backend in op.backends)]
    assert len(with_triton) > 3
    assert line == f"not triton on cuda: triton is not installed (pip install triton) ({', '.join(with_triton)})"
    assert "not cpu on cuda: it runs on cpu tensors, not cuda (every op)" in shown or extension.error
    assert "CUDA kernels" in shown and "H100" in shown and "There is no GPU" not in shown


def test_roofs_are_measured_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(roofs, "measure_roofs", lambda: Roofs(1e11, 2e9, 2**34, 2))
    assert main(["info", "--roofs", "--json"]) == 0
    stored = {"multiply_adds": 1e11, "exponentials": 2e9, "copied_bytes": 2**34, "threads": 2}
    assert json.loads(capsys.readouterr().out)["roofs"] == stored
    assert main(["info", "--roofs"]) == 0
    shown = capsys.readouterr().out
    assert (
        "Roofs" in shown
        and "2, measured together" in shown
        and "100 G a second" in shown
        and "16.0 GiB a second" in shown
    )
    monkeypatch.setattr(roofs, "measure_roofs", lambda: None)
    assert main(["info", "--roofs"]) == 0
    assert "not measured" in capsys.readouterr().out


def test_what_was_never_built_is_no_problem(monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "error", "the C++ extension was not built")
    for record, found in (({}, []), ({"skipped": "no compiler"}, []), ({"compiler": "c++"}, [extension.error])):
        monkeypatch.setattr(extension, "build_record", record.copy)
        assert environment.problems() == found


def test_cuda_kernels_of_another_torch_are_no_problem(monkeypatch):
    monkeypatch.setattr(extension, "error", None)
    monkeypatch.setattr(extension, "cuda_error", "the CUDA kernels failed to load")
    monkeypatch.setattr(extension, "build_record", lambda: {"cuda": {"nvcc": "13"}})
    for version, found in ((None, []), ("13.0", [extension.cuda_error])):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert environment.problems() == found
    monkeypatch.setattr(extension, "build_record", lambda: {"cuda": {"skipped": "no nvcc"}})
    monkeypatch.setattr(extension, "__file__", "/nowhere/extension.py")
    assert environment.problems() == []


def run_info(*options, folder=None, **env):
    """``info`` in a process of its own; of the package in ``folder``, which an editable install must not complete."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        if folder
        else "import sys\n"
    )
    code += f"from perceiver_fast.__main__ import main; sys.exit(main(['info', *{options}]))"
    env = os.environ | env | ({"PYTHONPATH": str(folder)} if folder else {})
    return python("-c", code, env=env, cwd=folder)


@pytest.mark.skipif(**needs_extension)
def test_it_runs_with_an_instruction_set_that_is_none():
    done = run_info(PERCEIVER_FAST_CPU_ISA="none of them")
    assert done.returncode == 1, done.stderr
    assert "WHAT WAS BUILT DOES NOT LOAD" in done.stdout and "failed to load" in done.stdout
    assert "expected one of" in done.stdout and "None" not in done.stdout
    assert ["cross_attention", "sdpa"] in [line.split()[:2] for line in done.stdout.splitlines()]
    assert (
        "not cpu on cpu: the C++ extension failed to load" in done.stdout
        and "the C++ extension failed to load" in done.stderr
    )


@pytest.fixture
def copied(tmp_path):
    """The package's Python files alone, in a folder of their own."""
    skipped = shutil.ignore_patterns("_C*", "_cuda*", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "perceiver_fast", ignore=skipped)
    return tmp_path


def test_it_runs_with_an_extension_that_cannot_be_imported(copied):
    (copied / "perceiver_fast" / "_C.py").write_text("raise ImportError('undefined symbol: aoti_torch_something')\n")
    done = run_info("--json", folder=copied)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    (problem,) = found["problems"]
    assert problem.startswith("the C++ extension failed to load") and "aoti_torch_something" in problem
    assert found["extension"] == {"built": False, "reason": problem}
    assert found["backends"]["layer_norm"]["cpu"]["cpu"] and not found["backends"]["layer_norm"]["cpu"]["reference"]


def test_it_runs_without_an_extension(copied):
    done = run_info(folder=copied)
    assert done.returncode == 0, done.stderr
    assert "was not built" in done.stdout and "DOES NOT LOAD" not in done.stdout
    assert ["grid_attention", "reference"] in [line.split()[:2] for line in done.stdout.splitlines()]
    assert done.stdout.count("not cpu on cpu: ") == 1 and "(every op)" in done.stdout


def test_it_says_what_it_cannot_do(capsys):
    assert main(["info", "--arch", "80"]) == 2
    assert "add --kernels" in capsys.readouterr().err
