"""Where the package came from, and the command that installs it again with its kernels."""

import json
import os
import sys
from importlib import metadata

import pytest
from warm_python import python

from perceiver_fast import extension, installation


class Distribution:
    """An installed package, with what pip noted of its origin."""

    def __init__(self, origin):
        self.origin = origin

    def read_text(self, name):
        assert name == "direct_url.json"
        return self.origin and json.dumps(self.origin)


FROM = {
    "a clone": (dict(url="file:///some%20where/clone", dir_info={}), "'/some where/clone'"),
    "an editable clone": (dict(url="file:///clone", dir_info=dict(editable=True)), "-e /clone"),
    "a wheel's file": (dict(url="file:///x/perceiver_fast-1-py3-none-any.whl"), "/x/perceiver_fast-1-py3-none-any.whl"),
    "git": (dict(url="https://host/p.git", vcs_info=dict(vcs="git")), "git+https://host/p.git"),
    "an index": (None, "perceiver-fast"),
}


@pytest.mark.parametrize("name", FROM)
def test_origin(name, monkeypatch):
    noted, expected = FROM[name]
    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(noted))
    monkeypatch.setattr(installation, "checkout", lambda: None)
    assert installation.origin() == expected


def test_a_clone_that_was_never_installed(monkeypatch):
    def missing(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr(installation, "checkout", lambda: installation.PACKAGE.parent)
    assert installation.origin() == "-e ."


@pytest.mark.parametrize("isolated", [False, True])
def test_the_command_builds_as_it_was_built(isolated, monkeypatch):
    monkeypatch.setattr(extension, "build_record", lambda: dict(skipped="no compiler", isolated=isolated))
    monkeypatch.setattr(extension, "origin", lambda: "-e .")
    command = extension.mend()
    assert command.endswith("-e .") and "--no-cache-dir --force-reinstall --no-deps" in command
    assert ("--no-build-isolation" in command) == ("pybind11" in command) == (not isolated)


def test_the_folder_of_a_clone_is_named(tmp_path, monkeypatch):
    """Python takes the clone's folder, while the package with kernels is another one."""
    (tmp_path / "perceiver_fast").mkdir()
    (tmp_path / "perceiver_fast/libperceiver_fast.so").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(installation, "checkout", lambda: installation.PACKAGE.parent)
    assert installation.elsewhere() == tmp_path / "perceiver_fast"
    assert str(tmp_path) in extension._why_missing() and "`-e`" in extension._why_missing()
    monkeypatch.setattr(installation, "checkout", lambda: None)
    assert installation.elsewhere() is None


def test_a_worker_of_the_command_line_imports_what_it_needs():
    """It has the command's arguments, no main module with a file, and begins with a module deep in the package."""
    code = "import sys; sys.argv[0] = '/bin/perceiver-fast'; import perceiver_fast.insight.gpu_kernels as found; print(found)"
    path = os.pathsep.join(filter(None, [str(installation.PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    done = python("-c", code, env=os.environ | {"PYTHONPATH": path})
    assert "gpu_kernels" in done.stdout, done.stderr
