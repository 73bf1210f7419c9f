"""Builds with gcc's sanitizers: the extension with ASan and UBSan, csrc/core by itself with TSan, or ASan and UBSan.

``python -m tests.campaign.sanitizers TARGET`` builds one of TARGETS into out/campaign; ninja compiles what changed, and a
build that was cut off goes on where it was.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from . import OUT, ROOT
from .outcome import CRASH, DIFFERS, Outcome
from .sweep import Run

TARGETS = {
    "core-tsan": "thread",
    "core-asan": "address,undefined",
    "extension": "address,undefined",
    "core-tsan-baseline": "thread",
}
CAMPAIGN = ("core-tsan", "core-asan", "extension")  # the last one is the tests': it compiles in half the time
COMMON = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-Wno-uninitialized"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0:max_allocation_size_mb=2048",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
MOST = 20  # findings of csrc/core, after which it is not started again


class CannotBuild(RuntimeError):
    """A sanitized build is not there; the message says why."""


def setup_module():
    """setup.py, which knows sources and flags."""
    spec = importlib.util.spec_from_file_location("perceiver_fast_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup


def build_core(target: str) -> None:
    """Compile csrc/core with core.cpp, the program that calls it."""
    setup, folder = setup_module(), OUT / target
    sanitize = [f"-fsanitize={TARGETS[target]}", "-pthread"]
    flags = [flag for flag in setup.FLAGS if flag not in ("-O3", "-fvisibility=hidden")] + [*COMMON, sanitize[0]]
    flags += ["-Og"] if target.endswith("-baseline") else []  # in two thirds of the time
    sources = [source for source in setup.core_sources() if "roofs" not in source[0]]
    sources.append(("campaign_core", ROOT / "tests/campaign/core.cpp", []))
    if not target.endswith("-baseline"):
        setup.run_ninja(folder, folder / "core", ["g++"], flags, sanitize, sources)
        return
    # The other instruction sets' kernels are never called. A shared library, bound lazily, does without them.
    sources = [source for source in sources if not source[0].endswith(("_avx2", "_avx512", "_avx512_bf16"))]
    setup.run_ninja(folder, folder / "libcore.so", ["g++"], flags, [*sanitize, "-shared", "-Wl,-z,lazy"], sources)
    link = [folder / "libcore.so", "-Wl,--allow-shlib-undefined", "-Wl,-z,lazy", f"-Wl,-rpath,{folder}"]
    subprocess.run(["g++", *sanitize, *link, "-o", folder / "core"], check=True)


def build_extension() -> None:
    """Build the extension, and lay the package out beside it: links to the sources, but for what is compiled."""
    folder, sanitize = OUT / "extension", f"-fsanitize={TARGETS['extension']}"
    env = os.environ | {
        "CXX": "g++",
        "CXXFLAGS": " ".join([*COMMON, sanitize, "-fno-sanitize=vptr"]),
        "LDFLAGS": sanitize,
        "PERCEIVER_FAST_FORCE_BUILD": "1",
        "PERCEIVER_FAST_SKIP_CUDA_BUILD": "1",
    }
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    package = folder / "run" / "perceiver_fast"
    shutil.rmtree(package.parent, ignore_errors=True)
    package.mkdir(parents=True)
    (package.parent / "tests").symlink_to(ROOT / "tests")
    for path in [*(ROOT / "perceiver_fast").iterdir(), *(folder / "lib" / "perceiver_fast").iterdir()]:
        compiled = path.suffix == ".so" or path.name == "_build.json"
        if compiled == path.is_relative_to(folder) and path.name not in ("kernels", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")


def build(target: str, seconds: float) -> None:
    """Build one of TARGETS, in a process of its own.

    Raises:
        CannotBuild: g++ is missing, it does not compile, or the time is over.
    """
    if shutil.which("g++") is None:
        raise CannotBuild("g++, whose sanitizers are used, was not found")
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / f"{target}.log").open("w") as log:
        command = [sys.executable, "-m", "tests.campaign.sanitizers", target]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise CannotBuild(
                f"building {target} takes longer than the {seconds:.0f} seconds it had; give more minutes, or run the "
                "command again: what was compiled is kept"
            ) from None
    if code != 0:
        raise CannotBuild(f"building {target} failed: see {(OUT / f'{target}.log').relative_to(ROOT)}")


def extension_runs() -> list[Run]:
    """The parts that call the extension, on the build that ``build("extension")`` left."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second, since ASan wants to find what throws
    ]
    env = OPTIONS | {"LD_PRELOAD": " ".join(libraries)}
    return [Run(part, "ASan and UBSan", env, OUT / "extension" / "run") for part in ("ops", "raw")]


class CoreSweep:
    """Runs the program of csrc/core; what it has is what a :class:`~campaign.sweep.Sweep` has.

    Args:
        target: one of TARGETS that begins with core, built.
        first: the first seed.
        report: called with this sweep now and then.
    """

    def __init__(self, target: str, first: int, report: Callable[[CoreSweep], None] = lambda sweep: None):
        isa = {"PERCEIVER_FAST_CPU_ISA": "baseline"} if target.endswith("-baseline") else {}
        self.run = Run("core", "ASan and UBSan" if "asan" in target else "TSan", OPTIONS | isa)
        self.program, self.report = OUT / target / "core", report
        self.total, self.cases, self.seconds = Outcome(), 0, 0.0
        self.failures: list[dict] = []
        self._next = first

    def for_seconds(self, seconds: float, most: int | None = None) -> CoreSweep:
        """Run cases for some time, and at most so many; after a finding with the next seed."""
        begin = time.monotonic()
        while (left := begin + seconds - time.monotonic()) > 0 and len(self.failures) < MOST:
            if most is not None and self.cases >= most:
                break
            self._once(min(left, 10.0), 10**9 if most is None else most - self.cases)
            self.report(self)
        self.seconds += time.monotonic() - begin
        return self

    def _once(self, seconds: float, most: int) -> None:
        command = [self.program, str(self._next), f"{seconds:.1f}", str(most)]
        done = subprocess.run(command, env=os.environ | self.run.env, capture_output=True, text=True)
        seeds = re.findall(r"^seed (\d+)$", done.stderr, re.MULTILINE)
        self.cases += len(seeds)
        said = [line for line in done.stderr.splitlines() if not line.startswith("seed ")]
        last = int(seeds[-1]) if seeds else self._next
        if done.returncode not in (0, 1) or not seeds:
            self._find(CRASH, last, "\n".join([f"exit status {done.returncode}", *said[:40]]))
        elif done.returncode == 1:
            self._find(DIFFERS, last, done.stdout)
        self._next = last + 1

    def _find(self, kind: str, seed: int, text: str) -> None:
        self.total.find(kind, text)
        where = self.program.relative_to(ROOT)
        self.failures.append(
            {"run": self.run.name, "kind": kind, "found": text, "command": f"{where} {seed} 0", "case": {"seed": seed}}
        )


if __name__ == "__main__":
    target = sys.argv[1]
    build_extension() if target == "extension" else build_core(target)
