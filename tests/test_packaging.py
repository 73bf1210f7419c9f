"""What a user installs: source distribution, wheel, empty environment, and builds that cannot be."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from elftools.elf.elffile import ELFFile
from packaging.requirements import Requirement
from warm_python import python

from perceiver_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", "_build.json", "out"
)


def run(*command, cwd, expect=0, **env):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | env, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources without anything that was built."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    shutil.copytree(ROOT, folder, ignore=IGNORED)
    return folder


def with_dependencies(name, seen):
    """The names of a distribution and of all that it needs here."""
    if name in seen:
        return
    seen.append(name)
    for requirement in map(Requirement, metadata.requires(name) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            with_dependencies(requirement.name, seen)


@pytest.fixture(scope="module")
def torch_of_this_environment(tmp_path_factory):
    """What makes pip take this environment's torch, for isolated builds too: environment variables.

    Torch is most of a gigabyte, so that it isn't unpacked again: pip finds a wheel of its name, which holds a .pth file
    that names a folder with links to it and to what it needs. All else is what pip downloads.
    """
    folder, wheels = tmp_path_factory.mktemp("links"), tmp_path_factory.mktemp("wheels")
    needed = []
    with_dependencies("torch", needed)
    for distribution in map(metadata.distribution, needed):
        for top in {file.parts[0] for file in distribution.files}:
            source = Path(distribution.locate_file(top))
            if source.suffix != ".dist-info" and top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(source)
    version = f"{torch.__version__.split('+')[0]}+linked"
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheels / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch_linked.pth", f"{folder}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    constraint = wheels / "torch.txt"
    constraint.write_text(f"torch=={version}\n")
    constraints = {"PIP_CONSTRAINT": str(constraint), "PIP_BUILD_CONSTRAINT": str(constraint)}
    return constraints | {"PIP_FIND_LINKS": str(wheels), "PIP_NO_COMPILE": "0"}  # false is yes


def build_wheel(source, to, expect=0, **env):
    """What pip asks of the build without isolation, in a process that begins with torch: the wheel, if any, and output."""
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = python("-c", code, to, cwd=source, env=os.environ | env)
    assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-3000:]
    return next(Path(to).glob("*.whl"), None), done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    to = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", to, cwd=checkout)
    (archive,) = to.glob("*.tar.gz")
    return archive


def test_sdist_holds_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    needed = [path for end in ("cpp", "h", "cu", "cuh") for path in ROOT.glob(f"csrc/**/*.{end}")]
    needed += [path for end in ("cpp", "h") for path in ROOT.glob(f"tests/**/*.{end}")]
    needed += ROOT.glob("perceiver_fast/**/*.py")
    needed += [
        *ROOT.glob("kernels/*.py"),
        ROOT / "kernels/configs.json",
        ROOT / "setup.py",
        ROOT / "LICENSE",
        ROOT / "README.md",
        ROOT / "CITATION.cff",
        ROOT / "perceiver_fast/py.typed",
    ]
    assert len(needed) > 40
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    assert not any(name.endswith((".so", "_build.json")) for name in names)


def test_isolated_wheel_in_an_empty_environment(sdist, torch_of_this_environment, tmp_path):
    """The wheel, built from the sdist as pip builds it for users, runs the demo where nothing else is installed.

    It is compiled without optimisation: `make install` and the tests of the kernels have what is optimised.
    """
    with tarfile.open(sdist) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # newer than the oldest Pythons
        archive.extractall(tmp_path, **safely)
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    env = torch_of_this_environment | {
        "PERCEIVER_FAST_FORCE_BUILD": "1",
        "CXXFLAGS": "-O0",
        "PERCEIVER_FAST_MANYLINUX": "1",
    }
    run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", tmp_path / "wheel", ".", cwd=source, **env)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("perceiver_fast/_C") for name in names)
    assert "perceiver_fast/libperceiver_fast.so" in names
    assert {"perceiver_fast/kernels/__init__.py", "perceiver_fast/kernels/configs.json"} <= set(names)
    assert "perceiver_fast/_build.json" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel, cwd=tmp_path)
    glibc = re.search(r"platform tag to\s+\"manylinux_2_(\d+)_", shown)
    assert glibc and int(glibc[1]) <= 28, shown  # torch's own wheels are manylinux_2_28
    for library in ("libperceiver_fast.so", next(name for name in names if "/_C" in name).partition("/")[2]):
        zipfile.ZipFile(wheel).extract(f"perceiver_fast/{library}", tmp_path)
        with (tmp_path / "perceiver_fast" / library).open("rb") as file:
            symbols = list(ELFFile(file).get_section_by_name(".dynsym").iter_symbols())
        given = [symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"]
        # What csrc/manylinux.h puts in the place of libstdc++'s own must not be found by libstdc++.
        steps = ("_ZNSt15__exception_ptr13exception_ptr9_M_addref", "_ZNSt15__exception_ptr13exception_ptr10_M_release")
        assert given and not [name for name in given if name.startswith(steps)]

    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", f"{wheel}[demo]", cwd=tmp_path, **torch_of_this_environment)
    info = run(python, "-m", "perceiver_fast", "info", cwd=tmp_path)
    assert ["grid_attention", "cpu"] in [line.split()[:2] for line in info.splitlines()] and "active isa" in info
    demo = [python, "-m", "perceiver_fast", "demo", "--max-side", "40", "--repeats", "1", "--geometry", "readme"]
    shown = run(*demo, "--out", tmp_path / "out", cwd=tmp_path)
    assert "grid_attention on cpu" in shown and (tmp_path / "out" / "attention.png").stat().st_size > 10_000


def test_without_a_compiler_it_installs_pure_python(checkout, tmp_path):
    wheel, output = build_wheel(checkout, tmp_path, CXX="no-such-compiler")
    (line,) = [line for line in output.splitlines() if "installing pure Python" in line]
    assert "no-such-compiler was not found" in line and wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if ".data/" in name]
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert not list((tmp_path / "installed").glob("**/*.so"))
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"  # not this checkout
    code += "import perceiver_fast as pf, torch; from perceiver_fast import extension; print(extension.error)\n"
    code += "model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4., num_latents=3, latent_dim=8)\n"
    code += "print(pf.explain(model, torch.randn(1, 4, 4, 3))); model(torch.randn(1, 4, 4, 3))\n"
    code += "with pf.use_backend('reference'): model(torch.randn(1, 4, 4, 3))"
    done = python("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")})
    shown = done.stdout + done.stderr
    assert "was not built: CXX=no-such-compiler was not found" in shown and "cross_attention on sdpa" in shown
    assert shown.count("pip install --no-cache-dir --force-reinstall --no-deps --no-build-isolation ") == 1, shown


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory):
    """The wheel of a build that was skipped, and what the build said."""
    wheel, output = build_wheel(checkout, tmp_path_factory.mktemp("pure"), PERCEIVER_FAST_SKIP_BUILD="1")
    return zipfile.ZipFile(wheel), output


def test_skip_build_is_said(pure_wheel):
    assert "without the C++ kernels: PERCEIVER_FAST_SKIP_BUILD is set" in pure_wheel[1]


@pytest.fixture(scope="module")
def described(pure_wheel):
    """What the wheel says of itself: fields, and the long description as the message's text."""
    (name,) = (name for name in pure_wheel[0].namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(pure_wheel[0].read(name))


def test_metadata_is_there(described):
    assert described["Name"] == "perceiver-fast" and described["License-Expression"] == "MIT"
    assert described["Author"] == "The perceiver-fast authors" and "perceiver" in described["Keywords"].split(",")
    classifiers = described.get_all("Classifier")
    assert {"Typing :: Typed", "Programming Language :: C++"} <= set(classifiers)
    # With "Private :: Do Not Upload" or a license's classifier beside the license, an index refuses the package.
    assert not [name for name in classifiers if name.startswith(("Private ::", "License ::"))]


def test_wheel_says_that_it_has_types(pure_wheel):
    assert "perceiver_fast/py.typed" in pure_wheel[0].namelist()


def test_one_version_everywhere(described):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert described["Version"] == cited["version"] == __version__


def test_citation_has_what_its_format_asks_for(described):
    """The fields that cff-version 1.2.0 requires, of the software and of what it refers to."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(cited)
    assert [author["name"] for author in cited["authors"]] == [described["Author"]]
    assert cited["license"] == described["License-Expression"]
    assert all({"type", "title", "authors"} <= set(reference) for reference in cited["references"])
    assert "https://arxiv.org/abs/2103.03206" in [reference["url"] for reference in cited["references"]]


def test_long_description_has_no_link_into_the_checkout(described):
    """Where an index shows it, nothing is beside it; in the checkout the same links lead to files."""
    link = re.compile(r"\]\(([^)]+)\)")
    shown, text = described.get_payload(), (ROOT / "README.md").read_text()
    relative = [to for to in link.findall(text) if "://" not in to]
    assert len(relative) > 10 and all((ROOT / to.partition("#")[0]).exists() for to in relative)
    assert described["Description-Content-Type"] == "text/markdown"
    assert link.findall(shown) == [to for to in link.findall(text) if "://" in to] != []
    assert "[Drop-in](docs/drop-in.md)" in text and "Drop-in (`docs/drop-in.md`)" in shown


def test_forced_build_fails_loudly(checkout, tmp_path):
    env = {"PERCEIVER_FAST_FORCE_BUILD": "1", "CXX": "no-such-compiler"}
    _, output = build_wheel(checkout, tmp_path, expect=1, **env)
    assert "PERCEIVER_FAST_FORCE_BUILD is set, but CXX=no-such-compiler was not found" in output


def test_broken_source_is_an_error_only_when_forced(checkout, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(checkout, source)
    for path in source.glob("csrc/*/*.cpp"):  # that it compiles is other tests' to show
        path.write_text("this is not C++\n")
    _, output = build_wheel(source, tmp_path / "wheel", MAX_JOBS="1")
    assert "compiling failed" in output and "-j 1" in output
    _, output = build_wheel(source, tmp_path, expect=1, PERCEIVER_FAST_FORCE_BUILD="1")
    assert "compiling failed" in output


FAKE_COMPILER = """#!/bin/sh
case "$1" in
    --version) echo "fake compiler 1.0" ;;
    --list-gpu-arch) echo compute_80 compute_90 ;;
    *) {action} ;;
esac
"""


def fake_compiler(file, action='for last; do :; done; touch "$last"'):
    """A compiler that takes everything and writes empty files, or that does what it is told."""
    file.write_text(FAKE_COMPILER.format(action=action))
    file.chmod(0o755)
    return str(file)


def build_with_fake_compilers(checkout, folder, nvcc_action=None, **env):
    env |= {"CXX": fake_compiler(folder / "cxx"), "PERCEIVER_FAST_FORCE_CUDA_BUILD": "1"}
    env["CUDACXX"] = fake_compiler(folder / "nvcc", *([nvcc_action] if nvcc_action else []))
    wheel, output = build_wheel(checkout, folder / "wheel", **env)
    archive = zipfile.ZipFile(wheel)
    return archive.namelist(), json.loads(archive.read("perceiver_fast/_build.json")), output


def test_cuda_kernels_are_in_the_wheel(checkout, tmp_path):
    names, record, _ = build_with_fake_compilers(checkout, tmp_path)
    assert "perceiver_fast/_cuda.so" in names and record["cuda"]["archs"] == ["80", "90"]
    (wheel,) = (tmp_path / "wheel").glob("*.whl")  # of this Python and this kind of machine
    assert not wheel.name.endswith("any.whl") and f"-cp{sys.version_info.major}{sys.version_info.minor}-" in wheel.name
    assert record["cuda"]["compiler"] == "fake compiler 1.0" and "skipped" not in record


def test_cuda_kernels_that_fail_leave_the_others(checkout, tmp_path):
    names, record, output = build_with_fake_compilers(checkout, tmp_path, "exit 1")
    assert any(name.startswith("perceiver_fast/_C") for name in names) and "perceiver_fast/_cuda.so" not in names
    assert "compiling failed" in record["cuda"]["skipped"] and "skipped" not in record
    assert "without the CUDA kernels: compiling failed" in output


def test_cuda_build_can_be_left_out(checkout, tmp_path):
    names, record, _ = build_with_fake_compilers(checkout, tmp_path, PERCEIVER_FAST_SKIP_CUDA_BUILD="1")
    assert "perceiver_fast/_cuda.so" not in names
    assert record["cuda"] == {"skipped": "PERCEIVER_FAST_SKIP_CUDA_BUILD is set"}


def test_failing_cuda_kernels_are_an_error_when_forced(checkout, tmp_path):
    env = {"CXX": fake_compiler(tmp_path / "cxx"), "CUDACXX": fake_compiler(tmp_path / "nvcc", "exit 1")}
    env |= {"PERCEIVER_FAST_FORCE_BUILD": "1", "PERCEIVER_FAST_FORCE_CUDA_BUILD": "1"}
    assert "compiling failed" in build_wheel(checkout, tmp_path / "wheel", expect=1, **env)[1]


@pytest.mark.parametrize("install", ["no pybind11", "FORCE_BUILD"])
def test_the_install_matrix(install):
    """Two of what tools/install_matrix.py installs; docs/deploy.md has the table of all."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools/install_matrix.py", "--cheap", "--only", install], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
