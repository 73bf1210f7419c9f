"""Types: mypy accepts the package, and users' code gets the types that calls return.

Users' code is checked from an empty folder that finds the package by PYTHONPATH, as if it were installed: there mypy
takes the package's types only because of py.typed.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USER = ROOT / "tests" / "typing_user.py"


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """Runs mypy on files; its cache, most of which is torch's types, is shared by the tests."""
    cache, empty = tmp_path_factory.mktemp("mypy"), tmp_path_factory.mktemp("project")

    def run(*arguments, cwd=empty):
        command = [sys.executable, "-m", "mypy", "--cache-dir", cache, *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


def test_mypy_accepts_the_package(mypy):
    assert "Success: no issues found" in mypy("perceiver_fast", cwd=ROOT)


def test_calls_return_what_users_expect(mypy):
    assert "Success: no issues found in 1 source file" in mypy("--strict", USER)


def test_another_type_is_an_error(mypy, tmp_path):
    """That the test above can fail, and that types come from the package: one is wrong here, and nothing is Any."""
    line = "assert_type(pf.attention_map(model, scene), dict[str, Tensor])"
    text = USER.read_text()
    assert text.count(line) == 1
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace(line, line.replace("dict[str, Tensor]", "Tensor")))
    found = mypy("--strict", wrong)
    assert 'Expression is of type "dict[str, Tensor]", not "Tensor"' in found and "Found 1 error" in found, found
