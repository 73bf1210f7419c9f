"""Builds with ninja what is compiled, into perceiver_fast/, or says in one line why not.

    libperceiver_fast.so   torch's operators and their CPU kernels; needs torch, but no Python
    _C                     the Python module that loads it
    _cuda.so               the CUDA kernels

Environment variables:
    PERCEIVER_FAST_SKIP_BUILD=1        install pure Python.
    PERCEIVER_FAST_FORCE_BUILD=1       fail when the extension cannot be built, or the CUDA kernels do not compile.
    PERCEIVER_FAST_SKIP_CUDA_BUILD=1   leave the CUDA kernels out.
    PERCEIVER_FAST_FORCE_CUDA_BUILD=1  want them beside a torch without CUDA too; there they are not loaded.
    PERCEIVER_FAST_MANYLINUX=1         take symbols that old releases of Linux have, too: for wheels to publish.
    PERCEIVER_FAST_MACHINE             kind of machine to build for; default: this one. With aarch64, on an x86_64
                                       Linux, CXX is aarch64-linux-gnu-g++ unless set.
    PERCEIVER_FAST_CUDA_ARCHS          compute capabilities; default: "80;90;100", those that nvcc knows.
    MAX_JOBS                           parallel compile jobs; default: what cores and free memory allow.
    CXX                                the C++ compiler; default: c++, g++ or clang++.
    CXXFLAGS, LDFLAGS                  further flags, after the build's own.
    CUDACXX, CUDA_HOME                 nvcc, or the toolkit that holds it; default: the nvcc on PATH.
"""

import ast
import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)  # the stable ABI the bindings target; one build runs on this torch and every later one
GIGABYTES_PER_JOB = 1.0
LIBRARY = "libperceiver_fast.so"
INPLACE = ROOT / "build/inplace"  # objects of a checkout's extension: what has not changed is not compiled again
FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall".split()
CUDA_ARCHS = ("80", "90", "100")
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -DUSE_CUDA".split()
# GCC warns about its own intrinsics (maybe-uninitialized) and about vector types as template arguments.
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-ignored-attributes", "-Wno-unknown-warning-option"]
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512"
# Instruction sets that csrc/core/*_kernels.cpp are compiled for, one after the other: bytes of a vector, and flags.
ISAS = {
    "baseline": (16, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, AVX512.split()),
}
# What *_bfloat16_kernels.cpp are compiled for, once: avx512 with products of pairs of bfloat16, where the compiler knows them.
BFLOAT16_ISAS = {"avx512_bf16": (64, [*AVX512.split(), "-mavx512bf16"])}
SINCE_GCC_10 = ("-mavx512bf16",)


class CannotBuild(Exception):
    """Something the build needs is missing, or the build failed."""


class CompilingFailed(CannotBuild):
    """All was there, but the compiler would not."""


def flag(name):
    return os.environ.get(name, "") not in ("", "0")


def need(condition, what):
    if not condition:
        raise CannotBuild(what)
    return condition


def machine():
    """The kind of machine to build for."""
    return os.environ.get("PERCEIVER_FAST_MACHINE") or platform.machine()


def is_foreign():
    return machine() != platform.machine()


def find_compiler():
    """The compiler's command as a list: CXX may hold a wrapper and arguments."""
    wish = shlex.split(os.environ.get("CXX", ""))
    if wish:
        need(shutil.which(wish[0]), f"CXX={wish[0]} was not found")
        return wish
    if is_foreign():
        cross = f"{machine()}-linux-gnu-g++"
        return [need(shutil.which(cross), f"{cross}, which compiles for {machine()}, was not found")]
    found = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    need(found, "no C++ compiler (c++, g++ or clang++) was found")
    return found[:1]


def import_needed(name, install):
    try:
        return __import__(name)
    except ImportError as error:
        raise CannotBuild(f"the Python package {install} is missing ({error})") from error


def torch_library(torch, folder, compiler):
    """Flags that link to torch's library: this one, or, for another kind of machine, an empty one of its name."""
    if not is_foreign():
        return [shlex.quote(f"-L{Path(torch.__file__).parent / 'lib'}"), "-ltorch_cpu"]
    folder.mkdir(parents=True, exist_ok=True)
    empty = ["-shared", "-Wl,-soname,libtorch_cpu.so", "-x", "c++", os.devnull, "-o", str(folder / "libtorch_cpu.so")]
    if subprocess.run([*compiler, *empty]).returncode != 0:
        raise CompilingFailed(f"{shlex.join(compiler)} cannot link an empty library")
    return [shlex.quote(f"-L{folder}"), "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]


def max_jobs():
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        jobs = min(jobs, int(free / (GIGABYTES_PER_JOB * 2**30)))
    return max(1, jobs)


def torch_flags(torch):
    target = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
    return [shlex.quote(f"-I{Path(torch.__file__).parent / 'include'}"), target]


def manylinux_flags():
    if not flag("PERCEIVER_FAST_MANYLINUX"):
        return []
    return ["-include", shlex.quote(str(ROOT / "csrc/manylinux.h"))]


@functools.cache
def is_known(flag):
    """Whether the compiler takes a flag; of those that all compilers take it is not asked."""
    if flag not in SINCE_GCC_10:
        return True
    command = [*find_compiler(), flag, "-x", "c++", "-fsyntax-only", os.devnull]
    known = subprocess.run(command, capture_output=True).returncode == 0
    if not known:
        print(f"perceiver-fast: without the kernels that {flag} is for: the compiler does not know it", file=sys.stderr)
    return known


def isa_flags(isas=ISAS):
    """Flags of every instruction set for this kind of machine, by name."""
    x86 = machine().lower() in ("x86_64", "amd64")
    return {
        isa: [f"-DPF_ISA={isa}", f"-DPF_VECTOR_BYTES={vector_bytes}", *filter(is_known, flags)]
        for isa, (vector_bytes, flags) in isas.items()
        if x86 or isa == "baseline"
    }


def core_sources():
    """(name of the object, source, flags) of csrc/core; the kernels' once for every instruction set they are for."""
    for source in sorted((ROOT / "csrc/core").glob("*.cpp")):
        if source.stem.endswith("_kernels"):
            isas = isa_flags(BFLOAT16_ISAS if source.stem.endswith("_bfloat16_kernels") else ISAS)
            yield from ((f"core_{source.stem}_{isa}", source, flags) for isa, flags in isas.items())
        else:
            yield f"core_{source.stem}", source, []


def schemas():
    """The schemas of the operators that perceiver_fast/ops declares, read without importing it."""
    for path in sorted((ROOT / "perceiver_fast/ops").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Operator":
                yield ast.literal_eval(node.args[0])


def write_definitions(folder):
    """A source that defines the operators for processes without Python; it is touched only where it changes."""
    lines = [f"  m.def({json.dumps(schema)});" for schema in schemas()]
    header = "#include <torch/csrc/stable/library.h>\n\nSTABLE_TORCH_LIBRARY_FRAGMENT(perceiver_fast, m) {"
    source, text = folder / "definitions.cpp", "\n".join([header, *lines, "}", ""])
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return source


def library_sources(torch, folder):
    """(name of the object, source, flags) of the library."""
    yield from core_sources()
    yield "about", ROOT / "csrc/about.cpp", []
    for source in (*sorted((ROOT / "csrc/cpu").glob("*.cpp")), write_definitions(folder)):
        yield f"cpu_{source.stem}", source, torch_flags(torch)


def module_sources(torch, pybind11):
    """(name of the object, source, flags) of the Python module."""
    includes = [shlex.quote(f"-I{path}") for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    info = {"PF_TORCH_VERSION": torch.__version__, "PF_TORCH_TARGET": ".".join(map(str, OLDEST_TORCH))}
    yield "module", ROOT / "csrc/module.cpp", [*includes, *(f'-D{name}=\\"{value}\\"' for name, value in info.items())]


def find_nvcc(torch):
    """The CUDA compiler's command as a list, if the kernels it would build are wanted here."""
    need(not flag("PERCEIVER_FAST_SKIP_CUDA_BUILD"), "PERCEIVER_FAST_SKIP_CUDA_BUILD is set")
    wanted = torch.version.cuda or flag("PERCEIVER_FAST_FORCE_CUDA_BUILD")
    need(wanted, f"torch {torch.__version__} is not a CUDA build")
    nvcc = shlex.split(os.environ.get("CUDACXX", ""))
    if not nvcc:
        home = os.environ.get("CUDA_HOME", "")
        nvcc = [path for path in (home and shutil.which("nvcc", path=f"{home}/bin"), shutil.which("nvcc")) if path][:1]
    need(nvcc and shutil.which(nvcc[0]), "nvcc was not found (CUDACXX, CUDA_HOME or PATH)")
    return nvcc


def cuda_archs(nvcc):
    """Capabilities to compile for: those asked for, else the default ones that this nvcc knows."""
    wish = os.environ.get("PERCEIVER_FAST_CUDA_ARCHS", "").replace(",", ";")
    if wish:
        archs = [arch.strip().replace(".", "") for arch in wish.split(";") if arch.strip()]
        return need(archs, "PERCEIVER_FAST_CUDA_ARCHS names no architecture")
    known = subprocess.run([*nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return need([arch for arch in CUDA_ARCHS if f"compute_{arch}" in known], f"{nvcc[0]} knows none of {CUDA_ARCHS}")


def run_ninja(folder, target, compiler, flags, link, sources):
    """Compiles what changed of (name of the object, source, flags) and links it into `target`."""
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    need(ninja, "ninja was not found (pip install ninja)")

    def path(name):
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        "ninja_required_version = 1.5",
        f"compiler = {shlex.join(compiler)}",
        f"flags = {' '.join(flags)}",
        f"link = {' '.join(link)}",
        "rule compile",
        "  command = $compiler -MMD -MF $out.d $flags $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $compiler $in $link -o $out",
        "  description = $out",
    ]
    objects = []
    for name, source, own in sources:
        objects.append(path(folder / f"{name}.o"))
        lines += [f"build {objects[-1]}: compile {path(source)}", f"  own = {' '.join(own)}"]
    lines += [f"build {path(target)}: link {' '.join(objects)}", f"default {path(target)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    command = [ninja, "-C", str(folder), "-j", str(max_jobs())]
    print("perceiver-fast:", " ".join(command), flush=True)
    if subprocess.run(command).returncode != 0:
        raise CompilingFailed(f"compiling failed; run `pip install -v .` to see how ({shlex.join(compiler)})")


def version_of(compiler, line):
    lines = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    return lines[line] if lines else shlex.join(compiler)


class BuildWithNinja(build_ext):
    """Compiles what changed; without a compiler it leaves the extension out and writes down why."""

    def get_ext_filename(self, fullname):
        filename = super().get_ext_filename(fullname)
        return filename.replace(platform.machine(), machine()) if is_foreign() else filename

    def run(self):
        (ext,) = self.extensions
        extension = Path(self.get_ext_fullpath(ext.name)).resolve()
        cuda = extension.with_name("_cuda.so")
        try:
            need(not flag("PERCEIVER_FAST_SKIP_BUILD"), "PERCEIVER_FAST_SKIP_BUILD is set")
            record = self.compile(extension)
            record["cuda"] = self.compile_cuda(cuda)
        except CannotBuild as reason:
            if flag("PERCEIVER_FAST_FORCE_BUILD"):
                raise SystemExit(f"perceiver-fast: PERCEIVER_FAST_FORCE_BUILD is set, but {reason}") from reason
            print(f"perceiver-fast: installing pure Python, without the C++ kernels: {reason}", file=sys.stderr)
            for built in (extension, extension.with_name(LIBRARY), cuda):  # of an earlier build
                built.unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            record = {"skipped": str(reason), "cuda": {"skipped": str(reason)}}
        package = ROOT / "perceiver_fast" if self.inplace else Path(self.build_lib) / "perceiver_fast"
        package.mkdir(parents=True, exist_ok=True)
        record["isolated"] = any("pip-build-env" in path for path in sys.path)  # pip made an environment for the build
        (package / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def compile(self, target):
        need(sys.platform != "win32", "Windows is not supported by the C++ kernels")
        compiler = find_compiler()
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        need(header.exists(), f"the Python headers are missing (no {header.name}; install python3-dev or the like)")
        torch = import_needed("torch", "torch>=" + ".".join(map(str, OLDEST_TORCH)))
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        need(version >= OLDEST_TORCH, f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
        pybind11 = import_needed("pybind11", "pybind11")
        flags, more = [*FLAGS, *manylinux_flags(), os.environ.get("CXXFLAGS", "")], os.environ.get("LDFLAGS", "")
        folder = INPLACE if self.inplace else (Path(self.build_temp) / "ninja").resolve()
        library = target.with_name(LIBRARY)
        if sys.platform == "darwin":
            shared = ["-dynamiclib", f"-install_name @rpath/{LIBRARY}"]
            module = ["-bundle", "-undefined dynamic_lookup", "-Wl,-rpath,@loader_path"]
        else:
            shared = ["-shared", f"-Wl,-soname,{LIBRARY}"]
            module = ["-shared", "'-Wl,-rpath,$$ORIGIN'"]
        shared += [*torch_library(torch, folder, compiler), more]
        run_ninja(folder, library, compiler, flags, shared, library_sources(torch, folder))
        module += [shlex.quote(str(library)), more]
        run_ninja(folder / "module", target, compiler, flags, module, module_sources(torch, pybind11))
        about = {"machine": machine(), "compiler": version_of(compiler, 0)}
        return about | {"torch": torch.__version__, "flags": " ".join(FLAGS)}

    def compile_cuda(self, target):
        """A library of its own, since it loads only beside a torch with CUDA; the CPU kernels do without it."""
        import torch

        try:
            nvcc = find_nvcc(torch)
            archs = cuda_archs(nvcc)
            codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")  # for what comes after
            host = shlex.split(os.environ.get("CXX", ""))
            codes += [f"-ccbin={shlex.quote(host[0])}"] if len(host) == 1 else []  # nvcc takes no wrapper
            lib = Path(torch.__file__).parent / "lib"
            libraries = ["-ltorch_cpu", "-ltorch_cuda"] if torch.version.cuda else ["-ltorch_cpu"]
            link = ["-shared", shlex.quote(f"-L{lib}"), *libraries]
            sources = [(source.stem, source, []) for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
            folder = (Path(self.build_temp) / "ninja_cuda").resolve()
            run_ninja(folder, target, nvcc, [*CUDA_FLAGS, *torch_flags(torch), *codes], link, sources)
            return {"compiler": version_of(nvcc, -1), "torch": torch.__version__, "archs": archs}
        except CannotBuild as reason:
            wanted = isinstance(reason, CompilingFailed) or flag("PERCEIVER_FAST_FORCE_CUDA_BUILD")
            if wanted and flag("PERCEIVER_FAST_FORCE_BUILD"):
                raise
            print(f"perceiver-fast: without the CUDA kernels: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)  # of an earlier build
            return {"skipped": str(reason)}


class Wheel(bdist_wheel):
    """Without an extension it is a wheel for any machine, and says so in its name."""

    def finalize_options(self):
        if is_foreign():
            self.plat_name = f"linux_{machine()}"
        super().finalize_options()

    def run(self):
        self.run_command("build")  # what there is to pack is known afterwards
        self.skip_build, self.root_is_pure = True, not self.distribution.has_ext_modules()
        super().run()


def readme():
    """README.md for those who have no checkout beside it: links to its files become their paths.

    They come with the source distribution, and the project has no public address yet that links could lead to.
    """
    links = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)")
    return links.sub(r"\1 (`\2`)", (ROOT / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":  # tests import the flags
    setup(
        long_description=readme(),
        long_description_content_type="text/markdown",
        ext_modules=[Extension("perceiver_fast._C", sources=[])],
        cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": Wheel},
    )
