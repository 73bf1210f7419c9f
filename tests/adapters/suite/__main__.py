"""``python -m tests.adapters.suite``: transformers' own common model tests, on its Perceiver heads as they are and accelerated.

They are in the source distribution of the installed release, which pip downloads; so is parameterized, which they need.
Exit status: 0 every test has the same outcome on both, 1 some differ, 2 they could not run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "out" / "transformers-suite"
MISSING = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def pip(*arguments: str) -> None:
    """pip of this environment, quietly.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps"], check=True)


def prepare() -> Path:
    """The folder that holds transformers' tests and, among them, ours; made anew."""
    import transformers

    release = f"transformers-{transformers.__version__}"
    archive = OUT / f"{release}.tar.gz"
    if not archive.exists():
        wanted = f"transformers=={transformers.__version__}"
        pip("download", "--no-binary", ":all:", "--no-build-isolation", "--dest", str(OUT), wanted)
        pip("install", "--target", str(OUT / "needed"), "parameterized")
    with tarfile.open(archive) as opened:
        members = [member for member in opened if member.name.startswith(f"{release}/tests/")]
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # newer than the oldest Pythons
        opened.extractall(OUT, members, **safely)
    folder = OUT / release
    model = folder / "tests" / "models" / "perceiver"
    model.mkdir(parents=True, exist_ok=True)
    for path, mixin in MISSING.items():  # tests of what the Perceiver has not, which the distribution leaves out
        (folder / "tests" / path).parent.mkdir(exist_ok=True)
        (folder / "tests" / path).write_text(f"class {mixin}:\n    pass\n")
    (model / "test_heads.py").write_text(Path(__file__).with_name("heads.py").read_text())
    for package in (model, model.parent, folder / "tests", *((folder / "tests" / p).parent for p in MISSING)):
        (package / "__init__.py").touch()
    return folder


def outcomes(folder: Path, accelerated: bool) -> dict[str, str]:
    """What became of every test, by its name.

    Raises:
        RuntimeError: pytest ran none of them.
    """
    report = OUT / f"{'accelerated' if accelerated else 'original'}.xml"
    paths = [ROOT, ROOT / "tests", OUT / "needed", folder]
    environment = os.environ | {
        "ACCELERATE": str(int(accelerated)),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [*command, "tests/models/perceiver"], cwd=folder, env=environment, capture_output=True, text=True
    )
    (OUT / f"{report.stem}.log").write_text(done.stdout + done.stderr)
    found = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname').rsplit('.', 1)[-1]}.{case.get('name')}"] = kinds.pop() if kinds else "passed"
    if "passed" not in found.values():
        raise RuntimeError(f"no test ran; see {(OUT / report.stem).relative_to(ROOT)}.log")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    argparse.ArgumentParser(
        prog="python -m tests.adapters.suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)
    console = Console()
    OUT.mkdir(parents=True, exist_ok=True)
    try:
        with console.status("transformers' tests: downloading"):
            folder = prepare()
        found = {}
        for accelerated in (False, True):
            with console.status(f"{folder.name}: {'accelerated' if accelerated else 'original'} models (a minute)"):
                found[accelerated] = outcomes(folder, accelerated)
    except (ImportError, subprocess.CalledProcessError, RuntimeError) as error:
        console.print(f"cannot run transformers' tests: {error}", style="red", markup=False)
        return 2
    for accelerated, results in found.items():
        counts = {kind: list(results.values()).count(kind) for kind in ("passed", "failure", "error", "skipped")}
        said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        console.print(f"{'accelerated' if accelerated else 'original':<12}{said}")
    names = sorted(found[False].keys() | found[True].keys())
    differing = [name for name in names if found[False].get(name) != found[True].get(name)]
    for name in differing:
        console.print(f"{name}: {found[False].get(name)} as it is, {found[True].get(name)} accelerated", style="red")
    console.print(f"{len(names)} tests of {folder.name}, {len(differing)} with another outcome on accelerated models")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
