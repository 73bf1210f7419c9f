"""csrc/core compiled for aarch64, and its tests in C++ run under qemu: NEON by the compiler's vector types.

Needs Debian's g++-aarch64-linux-gnu and qemu-user. The comparisons of attention with loops take two minutes there: they
run with PERCEIVER_FAST_TEST_ALL_KERNELS=1.
"""

import os
import shutil
import subprocess

import pytest
from core_build import setup, sources_of_tests

MISSING = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "ninja") if shutil.which(tool) is None]
GROUPS = ["functions", "tiles", "vectors", "rows"]
if os.environ.get("PERCEIVER_FAST_TEST_ALL_KERNELS") == "1":
    GROUPS.append("attention")

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{', '.join(MISSING)} not found: aarch64 was NOT tested (apt install g++-aarch64-linux-gnu qemu-user)",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aarch64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERCEIVER_FAST_MACHINE", "aarch64")
        flags = [flag for flag in setup.FLAGS if flag != "-O3"] + ["-O1"]
        sources = [*sources_of_tests(), *setup.core_sources()]
        setup.run_ninja(folder, folder / "core_tests", setup.find_compiler(), flags, ["-static"], sources)
    return folder / "core_tests"


@pytest.mark.parametrize("group", GROUPS)
def test_core_on_aarch64(program, group):
    done = subprocess.run(["qemu-aarch64", program, group], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-4000:], done.stderr)
    print(done.stdout)  # the errors that were found, beside those that are stated


def test_it_is_the_baseline_there(program):
    assert subprocess.run(["qemu-aarch64", program, "isas"], capture_output=True, text=True).stdout.split() == [
        "baseline"
    ]
