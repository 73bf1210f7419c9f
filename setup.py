"""Builds perceiver_fast._C with ninja, or says in one line why it does not; everything else is in pyproject.toml.

Environment variables:
    PERCEIVER_FAST_SKIP_BUILD=1   install pure Python.
    PERCEIVER_FAST_FORCE_BUILD=1  fail when the extension cannot be built.
    MAX_JOBS                      parallel compile jobs; default: what cores and free memory allow.
    CXX                           the C++ compiler; default: c++, g++ or clang++.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)  # the stable ABI the bindings target; one build runs on this torch and every later one
GIGABYTES_PER_JOB = 1.0
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall".split()
# GCC warns about its own intrinsics (maybe-uninitialized) and about vector types as template arguments.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes", "-Wno-unknown-warning-option"]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512".split(),
}


class CannotBuild(Exception):
    """Something the build needs is missing, or the build failed."""


def flag(name):
    return os.environ.get(name, "") not in ("", "0")


def need(condition, what):
    if not condition:
        raise CannotBuild(what)
    return condition


def find_compiler():
    """The compiler's command as a list: CXX may hold a wrapper and arguments."""
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        need(shutil.which(wish[0]), f"CXX={wish[0]} was not found")
        return wish
    found = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    need(found, "no C++ compiler (c++, g++ or clang++) was found")
    return found[:1]


def import_needed(name, install):
    try:
        return __import__(name)
    except ImportError as error:
        raise CannotBuild(f"the Python package {install} is missing ({error})") from error


def max_jobs():
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        jobs = min(jobs, int(free / (GIGABYTES_PER_JOB * 2**30)))
    return max(1, jobs)


def sources_with_flags(torch, pybind11):
    """Every source of the extension with the flags that are its own."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    torch_flags = [
        shlex.quote(f"-I{Path(torch.__file__).parent / 'include'}"),
        f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
    ]
    for source in sorted((ROOT / "csrc/core").glob("*.cpp")):
        isa = source.stem.rsplit("_", 1)[-1]
        if isa not in ISA_FLAGS or x86:
            yield source, ISA_FLAGS.get(isa, [])
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        yield source, torch_flags
    info = {"PF_TORCH_VERSION": torch.__version__, "PF_TORCH_TARGET": ".".join(map(str, OLDEST_TORCH))}
    yield ROOT / "csrc/module.cpp", [
        shlex.quote(f"-I{pybind11.get_include()}"),
        shlex.quote(f"-I{sysconfig.get_paths()['include']}"),
        *(f'-D{name}=\\"{value}\\"' for name, value in info.items()),
    ]


def ninja_path(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(folder, target, compiler, torch, pybind11):
    lib = Path(torch.__file__).parent / "lib"
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"cflags = {' '.join(FLAGS)} {os.environ.get('CXXFLAGS', '')}",
        f"ldflags = {' '.join(link)} {shlex.quote(f'-L{lib}')} -ltorch_cpu {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $cflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        "  command = $cxx $in $ldflags -o $out",
        "  description = $out",
    ]
    objects = []
    for source, flags in sources_with_flags(torch, pybind11):
        objects.append(ninja_path(folder / f"{source.parent.name}_{source.stem}.o"))
        lines += [f"build {objects[-1]}: compile {ninja_path(source)}", f"  flags = {' '.join(flags)}"]
    lines += [f"build {ninja_path(target)}: link {' '.join(objects)}", f"default {ninja_path(target)}", ""]
    (folder / "build.ninja").write_text("\n".join(lines))


class BuildWithNinja(build_ext):
    """Compiles what changed; without a compiler it leaves the extension out and writes down why."""

    def run(self):
        try:
            need(not flag("PERCEIVER_FAST_SKIP_BUILD"), "PERCEIVER_FAST_SKIP_BUILD is set")
            record = self.compile()
        except CannotBuild as reason:
            if flag("PERCEIVER_FAST_FORCE_BUILD"):
                raise SystemExit(f"perceiver-fast: PERCEIVER_FAST_FORCE_BUILD is set, but {reason}") from reason
            print(f"perceiver-fast: installing pure Python, without the C++ kernels: {reason}", file=sys.stderr)
            Path(self.get_ext_fullpath(self.extensions[0].name)).unlink(missing_ok=True)  # of an earlier build
            self.extensions = []
            record = {"skipped": str(reason)}
        package = ROOT / "perceiver_fast" if self.inplace else Path(self.build_lib) / "perceiver_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def compile(self):
        need(sys.platform != "win32", "Windows is not supported by the C++ kernels")
        compiler = find_compiler()
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        need(header.exists(), f"the Python headers are missing (no {header.name}; install python3-dev or the like)")
        torch = import_needed("torch", "torch>=" + ".".join(map(str, OLDEST_TORCH)))
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        need(version >= OLDEST_TORCH, f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        pybind11 = import_needed("pybind11", "pybind11")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        need(ninja, "ninja was not found (pip install ninja)")

        (ext,) = self.extensions
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = (Path(self.build_temp) / "ninja").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_ninja(folder, target, compiler, torch, pybind11)
        command = [ninja, "-C", str(folder), "-j", str(max_jobs())]
        print("perceiver-fast:", " ".join(command), flush=True)
        if subprocess.run(command).returncode != 0:
            raise CannotBuild(f"compiling failed; run `pip install -v .` to see how ({shlex.join(compiler)})")
        line = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
        return {"compiler": line[0] if line else shlex.join(compiler), "torch": torch.__version__, "flags": " ".join(FLAGS)}


setup(
    ext_modules=[Extension("perceiver_fast._C", sources=[])],
    cmdclass={"build_ext": BuildWithNinja},
)
