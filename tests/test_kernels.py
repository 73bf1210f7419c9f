"""The Triton kernels where there is no GPU: tests/kernels in Triton's interpreter, in processes of their own.

The interpreter is switched on before triton is imported, or not at all; the rest of the suite does not see it.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.name for path in (ROOT / "tests" / "kernels").glob("test_*.py"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels were NOT tested"
)


def interpret(file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment.pop("PERCEIVER_FAST_BACKEND", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def interpreted():
    """All files at once, on as many cores as there are: each is one thread."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {file: pool.submit(interpret, file) for file in FILES}


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, interpreted, capsys):
    done = interpreted[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    with capsys.disabled():
        print(f"\n  interpreted: {done.stdout.strip().splitlines()[-1]}", end="")


def test_importing_the_package_imports_no_compiler():
    """Triton and torch._dynamo take seconds to import: the first call that needs them does."""
    code = "import sys, torch; known = {'triton', 'torch._dynamo'} - set(sys.modules); import perceiver_fast; "
    code += "import perceiver_fast.kernels; print(sorted(known & set(sys.modules)), torch.cuda.is_initialized())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr
