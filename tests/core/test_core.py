"""csrc/core by itself, in C++, on every instruction set that this machine has: its parts, and its ops against loops.

Files named here are compiled like those of csrc/core: vectors, functions and tiles once for every instruction set. Where
this checkout's extension has been built, as `make install` does, its objects of csrc/core are those under test.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from core_build import ONCE_AN_ISA, setup, sources_of_tests

pytest.importorskip("setuptools", reason="setuptools is missing: the tests in C++ were NOT run")


def core_of_the_extension(ninja):
    """The objects of csrc/core that the extension was linked from, none older than its source; empty where they are not."""
    objects = [setup.INPLACE / f"{name}.o" for name, *_ in setup.core_sources()]
    if not (setup.INPLACE / "build.ninja").exists():
        return []
    subprocess.run([ninja, "-C", setup.INPLACE, *objects], check=True)
    return objects


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A folder with objects, and the program."""
    try:
        compiler = setup.find_compiler()
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        setup.need(ninja, "ninja was not found")
    except setup.CannotBuild as reason:
        pytest.skip(f"the tests in C++ were NOT run: {reason}")
    folder = tmp_path_factory.mktemp("core")
    # GCC warns about its own intrinsics where it optimises less.
    flags = [flag for flag in setup.FLAGS if flag != "-O3"] + ["-O1", "-Wno-uninitialized"]
    objects = core_of_the_extension(ninja)
    sources = [*sources_of_tests(), *([] if objects else setup.core_sources())]
    setup.run_ninja(folder, folder / "core_tests", compiler, flags, [shlex.quote(str(o)) for o in objects], sources)
    return folder


def run(build, *arguments, **env):
    return subprocess.run([build / "core_tests", *arguments], env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize("group", [*ONCE_AN_ISA, "attention", "rows", "regions"])
@pytest.mark.parametrize("isa", setup.ISAS)
def test_core(build, isa, group):
    available = run(build, "isas").stdout.split()
    if isa not in available:
        pytest.skip(f"this machine runs {', '.join(available)}, not {isa}: it was NOT tested")
    done = run(build, group, PERCEIVER_FAST_CPU_ISA=isa)
    assert done.returncode == 0, (done.returncode, done.stdout[-4000:], done.stderr)
    print(done.stdout)  # the errors that were found, beside those that are stated


def test_an_instruction_set_keeps_to_itself(build):
    """What is compiled for one defines no symbol that could be taken for the same function compiled for another."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm was not found: the symbols were NOT looked at")
    for isa in setup.isa_flags() | setup.isa_flags(setup.BFLOAT16_ISAS):
        core = setup.INPLACE if not list(build.glob("core_*.o")) else build
        files = [*build.glob(f"test_*_{isa}.o"), *core.glob(f"core_*_{isa}.o")]
        assert len(files) > (len(ONCE_AN_ISA) if isa in setup.ISAS else 0)
        for file in files:
            lines = subprocess.run([nm, "-C", "--defined-only", "-g", file], capture_output=True, text=True).stdout
            symbols = [line.split(maxsplit=2)[2] for line in lines.splitlines()]
            strangers = [name for name in symbols if f"perceiver_fast::{isa}::" not in name and "DW.ref" not in name]
            assert symbols and not strangers, (file.name, strangers)
