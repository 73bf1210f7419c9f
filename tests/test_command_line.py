"""The command line itself: help, exit codes, interruption and closed pipes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import __main__ as command_line
from perceiver_fast import installation
from perceiver_fast.commands import explain, info, options
from perceiver_fast.commands.demo import GEOMETRIES as COMPARED
from perceiver_fast.commands.profile import TOOLS
from perceiver_fast.insight.geometries import GEOMETRIES


@pytest.mark.parametrize("command", [[], *([name] for name in command_line.COMMANDS)], ids=str)
def test_help(command, capsys):
    try:
        code = command_line.main([*command, "--help"])
    except SystemExit as done:  # argparse's
        code = done.code
    shown = capsys.readouterr().out
    assert code == 0 and shown.startswith("usage: " + " ".join(["perceiver-fast", *command]))
    if not command:
        assert all(
            re.search(rf"^    {name}\s", shown, re.MULTILINE)
            for name in ("info", "demo", "accelerate", "explain", "bench", "profile")
        )
        assert "examples:" in shown and "exit codes:" in shown


@pytest.mark.parametrize("name", ["accelerate", "demo", "explain", "info", "profile"])
def test_every_option_says_what_it_does(name):
    subparsers = next(action for action in command_line.parser()._actions if action.choices)
    parser = subparsers.choices[name]
    assert parser.description and all(action.help for action in parser._actions)
    assert "--json" in parser.format_help()


def test_options_name_what_there_is():
    """They are apart from the commands, so that help needs no torch."""
    subparsers = next(action for action in command_line.parser()._actions if action.choices)
    (tool,) = [action for action in subparsers.choices["profile"]._actions if action.dest == "tool"]
    assert list(tool.choices) == ["torch", *TOOLS]
    assert tuple(GEOMETRIES) == options.NAMES and tuple(COMPARED) == options.COMPARED


HEAVY = ("torch", "rich", "numpy")
AS_COMMANDS = {
    "module": [sys.executable, "-m", "perceiver_fast"],
    "script": [sys.executable, "{script}"],
}
RUN = "import runpy; runpy.run_module('perceiver_fast', run_name='__main__', alter_sys=True)\n"
SCRIPT = "import sys\nfrom perceiver_fast.__main__ import main\nsys.exit(main())\n"  # as pip writes it


def as_command(how, arguments, folder, code=""):
    """The command line in a process of its own, which says on standard error what heavy modules it has imported."""
    said = (
        f"import atexit, sys; atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))"
    )
    (folder / "sitecustomize.py").write_text(f"{said}\n{code}")
    (folder / "perceiver-fast").write_text(SCRIPT)
    command = [word.format(script=folder / "perceiver-fast") for word in AS_COMMANDS[how]]
    paths = [str(folder), str(installation.PACKAGE.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.parametrize("how", AS_COMMANDS)
@pytest.mark.parametrize("command", [[], *([name] for name in command_line.COMMANDS)], ids=str)
def test_help_imports_neither_torch_nor_rich(how, command, tmp_path):
    done = as_command(how, [*command, "--help"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: " + " ".join(["perceiver-fast", *command]))
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


MINE = """
import perceiver_fast, torch
def build():
    assert torch.ops.perceiver_fast.grid_attention_forward and not perceiver_fast.installation.deferred()
    return perceiver_fast.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
"""


@pytest.mark.parametrize("how", AS_COMMANDS)
def test_usage_errors_import_nothing_and_runs_all(how, tmp_path):
    done = as_command(how, ["explain", "--no-such"], tmp_path)
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "[]"
    (tmp_path / "mine.py").write_text(MINE)
    done = as_command(how, ["explain", "mine:build", "--shape", "6x5x3", "--json"], tmp_path)
    assert done.returncode == 0 and '"grid_attention"' in done.stdout, done.stderr


def test_a_model_keeps_its_own_dtype(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine_of_a_dtype.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert command_line.main(["explain", "mine_of_a_dtype:build", "--shape", "6x5x3", "--dtype", "float32"]) == 2
    assert "keeps its own dtype" in capsys.readouterr().err


def test_the_first_name_makes_the_package_whole(tmp_path):
    """As in a worker process, which imports the command's script and never runs it."""
    (tmp_path / "perceiver-fast").write_text(
        "import perceiver_fast as pf\n"
        "assert pf.installation.deferred() and 'torch' not in __import__('sys').modules\n"
        "assert not hasattr(pf, '__path_of_nothing__') and pf.installation.deferred()\n"
        "from perceiver_fast import *\n"
        "assert Perceiver is pf.Perceiver is pf.models.Perceiver and not pf.installation.deferred()\n"
        "assert not hasattr(pf, 'no_such') and set(pf.__all__) <= set(dir(pf))\n"
    )
    env = os.environ | {"PYTHONPATH": str(installation.PACKAGE.parent)}
    done = subprocess.run([sys.executable, tmp_path / "perceiver-fast"], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def test_elsewhere_the_package_is_whole_at_once():
    told = installation.is_command_line
    assert told(["-m", "--help"], ["python", "-X", "dev", "-m", "perceiver_fast", "--help"])
    assert told(["-m"], ["python", "-m", "perceiver_fast"]) and told(["/bin/perceiver-fast", "info"], [])
    assert told(["perceiver-fast.exe"], [])
    for arguments in (["-m", "x"], ["-c"], [""], [], ["perceiver_fast.py"], ["train.py", "-m", "perceiver_fast"]):
        assert not told(arguments, ["python", "-m", "perceiver_fast.kernels.tune", "x"])
    assert not installation.deferred() and pf.Perceiver


def test_hints_fit_the_way_of_installation(tmp_path, monkeypatch):
    assert installation.checkout() == installation.PACKAGE.parent
    assert installation.install("demo") == "pip install -e '.[demo]'"
    monkeypatch.setattr(installation, "PACKAGE", tmp_path / "site-packages" / "perceiver_fast")
    assert installation.checkout() is None and installation.install("demo") == "pip install 'perceiver-fast[demo]'"


def test_a_wheel_names_no_checkout(tmp_path):
    """What commands say of a package without a repository around it: no make target, no path of the repository."""
    ignored = shutil.ignore_patterns("_C*", "_cuda*", "_build.json", "__pycache__")
    shutil.copytree(installation.PACKAGE, tmp_path / "perceiver_fast", ignore=ignored)
    code = (
        "import sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "absent = ('sklearn', 'matplotlib', 'perceiver_pytorch')\n"
        "util.find_spec = lambda name, *more: None if name in absent else real(name, *more)\n"
        "sys.modules['matplotlib'] = sys.modules['perceiver_pytorch'] = None\n"
    )
    told = []
    for arguments in (
        ["info"],
        ["demo"],
        ["bench", "--quick"],
        ["bench", "--help"],
        ["explain", "--geometry", "io-32"],
    ):
        env = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = python("-c", f"{code}{RUN}", *arguments, cwd=tmp_path, env=env)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr
        told.append(done.stdout + done.stderr)
    assert "was not built" in told[0] and "pip install 'perceiver-fast[demo]'" in told[1] and "clone" in told[2]
    for text in told:
        assert not re.search(r"\bmake \w+`|pip install -e|pip install \.|(benchmarks|examples|docs|tests)/", text), text


def test_without_a_command_it_prints_the_help(capsys):
    assert command_line.main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"perceiver-fast {pf.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["no-such"], ["--no-such"], ["info", "--no-such"], ["explain", "a:b", "c:d"], ["demo", "--repeats", "0"]],
    ids=str,
)
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main(arguments)
    assert done.value.code == 2 and "error: " in capsys.readouterr().err


def test_interrupted(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", run)
    assert command_line.main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch):
    def run(args):
        raise ZeroDivisionError("nobody foresaw this")

    monkeypatch.setattr(explain, "run", run)
    with pytest.raises(ZeroDivisionError, match="nobody foresaw this"):
        command_line.main(["explain", "--list"])


TINY_PROFILE = ["profile", "--tiny", "--geometry", "readme"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "--list"],
        ["explain", "--list", "--json"],
        [*TINY_PROFILE, "--tool", "perf", "--dry-run"],
        TINY_PROFILE,
    ],
    ids=str,
)
def test_a_closed_pipe_is_quiet(arguments, tmp_path):
    code = "import os; read, write = os.pipe(); os.dup2(write, 1); os.close(write); "
    code += "os.close(read)\n"  # as `| head` does when it has seen enough, but at once
    done = python("-c", f"{code}{RUN}", *arguments, cwd=tmp_path)
    assert done.returncode == 141 and "Broken pipe" not in done.stderr and "Traceback" not in done.stderr
