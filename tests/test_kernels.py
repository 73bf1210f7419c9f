"""The Triton kernels where there is no GPU: tests/kernels in Triton's interpreter, in processes of their own.

Cases of both half-precision dtypes run in one of them; in both with PERCEIVER_FAST_TEST_ALL_KERNELS=1.

The interpreter is switched on before triton is imported, or not at all; the rest of the suite does not see it.
"""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from warm_python import python

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels were NOT tested"
)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What pytest found in the folder: its output, and the outcomes of every file's tests.

    As many processes as there are cores, each of one thread, that take a file at a time: to begin one takes 8 s.
    """
    report = tmp_path_factory.mktemp("kernels") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", f"--junitxml={report}"]
    command += ["-n", str(len(os.sched_getaffinity(0))), "--dist", "loadfile", "-o", "junit_family=xunit1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment.pop("PERCEIVER_FAST_BACKEND", None)
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert report.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    outcomes = {file: Counter() for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        (outcome,) = {child.tag for child in case} & {"failure", "error", "skipped"} or {"passed"}
        outcomes[Path(case.get("file", "no file")).name][outcome] += 1
    return done, outcomes


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, interpreted, capsys):
    done, outcomes = interpreted
    found = outcomes[file]
    assert found["passed"] and not found["failure"] + found["error"], done.stdout[-6000:] + done.stderr[-2000:]
    with capsys.disabled():
        print(f"\n  interpreted: {', '.join(f'{count} {outcome}' for outcome, count in found.items())}", end="")


def test_nothing_else_failed(interpreted):
    """Neither did an import: a file that cannot be collected has no outcome of its own."""
    done, _ = interpreted
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_importing_the_package_imports_no_compiler():
    """Triton and torch._dynamo take seconds to import: the first call that needs them does."""
    code = "import sys, torch; known = {'triton', 'torch._dynamo'} - set(sys.modules); import perceiver_fast; "
    code += "import perceiver_fast.kernels; print(sorted(known & set(sys.modules)), torch.cuda.is_initialized())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = python("-c", code, cwd=ROOT, env=environment)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr
