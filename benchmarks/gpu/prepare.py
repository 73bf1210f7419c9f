"""Before anything is timed: the extension built in place, and the tests of what runs on a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.process import run_command

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 12  # of the tests: each holds a CUDA context, and a compiler
DRY_TESTS = ("tests/kernels/test_dropout.py",)
NO_TESTS = 5  # pytest's exit code when it collected none
# With several workers, or in the summary, the outcome comes before the test; with one behind it.
OUTCOME = re.compile(
    r"(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR|SKIPPED) (tests/.+)|(tests/.+?) (PASSED|FAILED|ERROR|SKIPPED)"
)


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


def interpreted() -> dict[str, str]:
    """The environment in which Triton's kernels run on a CPU."""
    return os.environ | {"TRITON_INTERPRET": "1"}


def gpu_tests() -> list[str]:
    """The kernels' tests, and every test file that has some for a GPU alone."""
    found = [ROOT / "tests" / "kernels"]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if path.parent != found[0] and "skipif(not torch.cuda.is_available()" in path.read_text():
            found.append(path)
    return [str(path.relative_to(ROOT)) for path in found]


def test(out: Path, seconds: float, dry: bool = False) -> dict:
    """Run the GPU's tests; their output goes to ``out``/tests.log, and says what passed until they end.

    Kernels compile for a second each, so up to WORKERS processes share the tests. Dry, it is one file in the interpreter.
    """
    files, environment = (list(DRY_TESTS), interpreted()) if dry else (gpu_tests(), None)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if not dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, len(os.sched_getaffinity(0))))]
    code, took = run_logged([*command, *files], out / "tests.log", seconds, environment)
    found = {"exit_code": code, "seconds": round(took, 1), "files": files, **read_log(out / "tests.log")}
    if code is None:
        return found | {"outcome": f"stopped after {seconds:.0f} s"}
    ran = found["tests"] - found["skipped"]
    if code == NO_TESTS or (code == 0 and not ran):
        return found | {"outcome": "none ran"}
    return found | {"outcome": "failed" if code else "passed"}


def read_log(log: Path) -> dict:
    """Counts and the failures' names from what pytest printed, be it to the end or not; zeros where there is nothing."""
    outcomes: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        if found := OUTCOME.match(line):
            before, name, other, after = found.groups()
            outcomes.setdefault((name or other).split(" - ")[0].strip(), before or after)
    counts = Counter(outcomes.values())
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    numbers = {"failures": counts["FAILED"], "errors": counts["ERROR"], "skipped": counts["SKIPPED"]}
    return {"tests": len(outcomes), **numbers, "failed": failed}
