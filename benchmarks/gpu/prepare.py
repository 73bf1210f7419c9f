"""Before anything is timed: the extension built in place, and the tests of what runs on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.process import run_command

ROOT = Path(__file__).resolve().parents[2]
TEST_FOLDERS = ("ops", "layers", "models")
NO_TESTS = 5  # pytest's exit code when it collected none


def run_logged(
    command: list[str], log: Path, seconds: float, environment: dict | None = None
) -> tuple[int | None, float]:
    """Run ``command`` in the checkout, its output to the console and to ``log``.

    Returns:
        Its exit code, None when it was stopped after ``seconds``; and how long it took.
    """
    print("$", " ".join(command), flush=True)
    with log.open("w", encoding="utf-8") as file:

        def report(line: str) -> None:
            for stream in (file, sys.stdout):
                print(line, end="", file=stream, flush=True)

        return run_command(command, ROOT, report, environment, seconds)


def build(out: Path, seconds: float, capability: str | None) -> dict:
    """Build the extension in place, its CUDA kernels for ``capability`` ("90") alone; never raises, says how it went."""
    environment = dict(os.environ)
    if capability:
        environment.setdefault("PERCEIVER_FAST_CUDA_ARCHS", capability)
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, took = run_logged(command, out / "build.log", seconds, environment)
    found = {"exit_code": code, "seconds": round(took, 1), "log": "build.log", "kernels": link_kernels()}
    if code is None:
        return found | {"outcome": f"stopped after {seconds:.0f} s"}
    record = ROOT / "perceiver_fast" / "_build.json"
    record = json.loads(record.read_text()) if code == 0 and record.exists() else {}
    skipped = {"extension": record.get("skipped"), "CUDA kernels": record.get("cuda", {}).get("skipped")}
    missing = [f"without the {what}: {why}" for what, why in skipped.items() if why]
    return found | {"outcome": "failed" if code else "; ".join(missing) or "built"}


def link_kernels() -> str:
    """Make ``perceiver_fast.kernels`` importable: an installation puts kernels/ there, a bare checkout does not."""
    link = ROOT / "perceiver_fast" / "kernels"
    if link.exists():
        return "in place"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import perceiver_fast.kernels as k; print(k.__file__)"
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    if Path(found.stdout.strip()).resolve().parent == ROOT / "kernels":  # not those of another checkout
        return "installed"
    try:
        link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    except OSError as error:
        return f"missing: {error}"
    return "linked"


def gpu_tests() -> list[str]:
    """The kernels' tests, and every test file of ops, layers and models that asks for a GPU."""
    found = [ROOT / "tests" / "kernels"]
    for folder in TEST_FOLDERS:
        for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
            if "cuda.is_available" in path.read_text():
                found.append(path)
    return [str(path.relative_to(ROOT)) for path in found]


def test(out: Path, seconds: float) -> dict:
    """Run the GPU's tests; their report goes to ``out``/tests.xml, their output to tests.log."""
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command.append(f"--junitxml={report.resolve()}")
    code, took = run_logged([*command, *gpu_tests()], out / "tests.log", seconds)
    found = {"exit_code": code, "seconds": round(took, 1), "files": gpu_tests(), **read_report(report)}
    if code is None:
        return found | {"outcome": f"stopped after {seconds:.0f} s"}
    ran = found["tests"] - found["skipped"]
    if code == NO_TESTS or (code == 0 and not ran):
        return found | {"outcome": "none ran"}
    return found | {"outcome": "failed" if code else "passed"}


def read_report(report: Path) -> dict:
    """Counts and the failures' names of a JUnit report; zeros when there is none."""
    try:
        root = ElementTree.parse(report).getroot()
    except (OSError, ElementTree.ParseError):
        root = ElementTree.Element("testsuites")
    counts = {
        key: sum(int(suite.get(key, 0)) for suite in root.iter("testsuite"))
        for key in ("tests", "failures", "errors", "skipped")
    }
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in root.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return counts | {"failed": failed}
