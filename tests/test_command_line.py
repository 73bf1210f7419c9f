"""The command line itself: help, exit codes, interruption and closed pipes."""

import os
import re
import subprocess
import sys

import pytest

import perceiver_fast as pf
from perceiver_fast import __main__ as command_line
from perceiver_fast.commands import explain, info


@pytest.mark.parametrize("command", [[], *([name] for name in command_line.COMMANDS)], ids=str)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main([*command, "--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and shown.startswith("usage: " + " ".join(["perceiver-fast", *command]))
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


def test_without_a_command_it_prints_the_help(capsys):
    assert command_line.main([]) == 0
    assert "examples:" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        command_line.main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out == f"perceiver-fast {pf.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["no-such"], ["--no-such"], ["info", "--no-such"], ["explain", "extra"], ["demo", "--repeats", "0"]],
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
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has seen enough, but at once
    command = [sys.executable, "-m", "perceiver_fast", *arguments]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.returncode == 141 and "Broken pipe" not in done.stderr and "Traceback" not in done.stderr
