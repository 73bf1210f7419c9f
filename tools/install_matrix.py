"""Installs the package as people do, with and without what its build needs, and says what each of them got.

For every Python and torch: pip with and without build isolation, without a compiler, without pybind11, without ninja, and
without a build on purpose. Where the kernels are missing, the first model must warn, and the command in the warning must
mend it. Every install is an environment of its own, made in a temporary folder and removed. Exit status: 0 all was as
expected, 1 something was not.

    python tools/install_matrix.py                       # everything; compiles without optimisation, minutes
    python tools/install_matrix.py --cheap               # what compiles nothing
    python tools/install_matrix.py --pythons python3.10 python3.13 --torches 2.10.0 2.13.0
"""

import argparse
import importlib.metadata as metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
BUILT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "site", "out", "*.egg-info", "*.so", "_build.json", "__pycache__"
)
BUILD = ["setuptools>=77", "pybind11>=2.13", "ninja>=1.11"]
PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, perceiver_fast as pf
    from perceiver_fast import extension
    for _ in range(2):
        model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=3, latent_dim=8)
        model(torch.randn(1, 8, 8, 3)).sum().backward()
texts = [str(w.message) for w in caught if isinstance(w.message, extension.MissingKernelsWarning)]
print(json.dumps(dict(error=extension.error, warnings=texts, torch=torch.__version__)))
"""


@dataclass(frozen=True)
class Cell:
    """One way to install: what is missing, and whether kernels are there afterwards."""

    what: str
    isolated: bool = False
    without: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    kernels: bool = False
    fails: str = ""  # what pip says where it installs nothing


NO_COMPILER = {"CXX": "no-such-compiler"}
CELLS = [
    Cell("pip install .", isolated=True, kernels=True),
    Cell("pip install ., no compiler", isolated=True, env=NO_COMPILER),
    Cell("--no-build-isolation", kernels=True),
    Cell("--no-build-isolation, no compiler", env=NO_COMPILER),
    Cell("--no-build-isolation, no pybind11", without=("pybind11",)),
    Cell("--no-build-isolation, no ninja", without=("ninja",), kernels=shutil.which("ninja", path="/usr/bin:/bin") is not None),
    Cell("PERCEIVER_FAST_SKIP_BUILD=1", env={"PERCEIVER_FAST_SKIP_BUILD": "1"}),
    Cell("PERCEIVER_FAST_FORCE_BUILD=1, no compiler", env=NO_COMPILER | {"PERCEIVER_FAST_FORCE_BUILD": "1"}, fails="FORCE_BUILD is set"),
]  # fmt: skip


class Environment:
    """A virtual environment with torch, in a folder.

    Args:
        source: what pip installs, a copy of this checkout.
        torch: a version from the index, or ``"here"``: links to the one that runs this script, and to what it needs.
    """

    def __init__(self, source: Path, folder: Path, python: str, torch: str):
        self.source = source
        subprocess.run([python, "-m", "venv", folder], check=True)
        self.python = folder / "bin" / "python"
        self.folder = folder
        # Of this process: no cache of wheels, no compiler's optimisation, no PATH to another environment's ninja.
        paths = [
            p
            for p in os.environ["PATH"].split(os.pathsep)
            if not (Path(p) / "ninja").exists() or p in ("/bin", "/usr/bin")
        ]
        self.env = os.environ | {"PATH": os.pathsep.join([str(folder / "bin"), *paths]), "PIP_NO_INPUT": "1"}
        self.env |= {"CXXFLAGS": "-O0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": ""}
        self.pip("uninstall", "-y", "setuptools")  # Pythons before 3.12 bring an old one
        version = metadata.version("torch").partition("+")[0] if torch == "here" else torch
        self.env |= {"PIP_CONSTRAINT": self.constraint(version), "PIP_BUILD_CONSTRAINT": self.constraint(version)}
        if torch == "here":
            self.link()
        else:
            self.pip("install", f"torch=={torch}")
        self.pip("install", "rich>=13", "packaging")

    def constraint(self, torch: str) -> str:
        file = self.folder / "constraints.txt"
        file.write_text(f"torch=={torch}\n")
        return str(file)

    def link(self) -> None:
        """Let it have this environment's torch without unpacking it again, in builds of their own too."""
        links, names, waiting = self.folder / "links", set(), ["torch"]
        links.mkdir()
        while waiting:
            name = waiting.pop()
            if name in names:
                continue
            names.add(name)
            for requirement in map(Requirement, metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
            for file in {
                f.parts[0] for f in metadata.files(name) or [] if f.parts[0] not in ("..", "__pycache__", "bin")
            }:
                target = links / file
                if not target.exists():
                    target.symlink_to(metadata.distribution(name).locate_file(file))
        (site,) = self.folder.glob("lib/python*/site-packages")
        (site / "links.pth").write_text(f"{links}\n")

    def pip(self, *arguments: str, expect: int | None = 0, **env: str) -> str:
        command = [str(self.python), "-m", "pip", *arguments]
        done = subprocess.run(
            command, cwd=self.source, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if expect is not None and done.returncode != expect:
            raise SystemExit(
                f"{done.stdout[-4000:]}\nexpected exit status {expect}, got {done.returncode}: {shlex.join(command)}"
            )
        return done.stdout

    def probe(self) -> dict:
        """What a model says that runs there."""
        done = subprocess.run(
            [self.python, "-c", PROBE],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise SystemExit(done.stdout[-4000:])
        return json.loads(done.stdout.splitlines()[-1])


def run_cell(source: Path, cell: Cell, python: str, torch: str, mend: bool) -> dict:
    """Install in one way; returns what came of it, ``problem`` empty where that is what should."""
    found = {"python": python, "torch": torch, "install": cell.what, "got": "", "mended": "", "problem": ""}
    with tempfile.TemporaryDirectory() as folder:
        environment = Environment(source, Path(folder), python, torch)
        if not cell.isolated:
            missing = [package for package in BUILD if package.startswith(cell.without)]
            environment.pip("install", *(package for package in BUILD if package not in missing))
        how = ["install"] if cell.isolated else ["install", "--no-build-isolation"]
        if torch == "here":
            how.append("--no-deps")
        said = environment.pip(*how, ".", expect=1 if cell.fails else 0, **cell.env)
        if cell.fails:
            found["got"] = "nothing: pip fails, and says why"
            found["problem"] = "" if cell.fails in said else f"pip did not name {cell.fails}"
            return found
        there = environment.probe()
        found["got"] = (
            "kernels"
            if there["error"] is None
            else f"pure Python: {there['error'].removeprefix('the C++ extension was not built: ')}"
        )
        if (there["error"] is None) != cell.kernels:
            found["problem"] = "kernels were expected" if cell.kernels else "no kernels were expected"
        elif len(there["warnings"]) != (0 if cell.kernels else 1):
            found["problem"] = f"{len(there['warnings'])} warnings"
        elif not cell.kernels and mend:
            (commands,) = re.findall(r"install it again with `(.*?)`", there["warnings"][0])
            for command in commands.split(" && "):
                environment.pip(*shlex.split(command.removeprefix("pip ")))
            mended = environment.probe()
            found["mended"] = "yes" if mended["error"] is None and not mended["warnings"] else f"no: {mended['error']}"
            found["problem"] = "" if found["mended"] == "yes" else "the command in the warning did not mend it"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pythons", nargs="+", default=[sys.executable], metavar="PYTHON", help="interpreters (default: this one)")
    add(
        "--torches",
        nargs="+",
        default=["here"],
        metavar="VERSION",
        help="from the index, or here: this environment's (default)",
    )
    add("--cheap", action="store_true", help="compile nothing: leave out what ends with kernels, and mending")
    add("--only", metavar="TEXT", help="only installs whose name contains this")
    add("--json", type=Path, metavar="FILE", help="write what was found")
    options = parser.parse_args()
    # With isolation pip installs a torch of the index for the build: a linked one does not count there.
    cells = [
        cell
        for cell in CELLS
        if not (options.cheap and (cell.kernels or cell.isolated)) and (options.only or "") in cell.what
    ]
    work = [(cell, python, torch) for python in options.pythons for torch in options.torches for cell in cells]
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT, Path(folder, "source"), ignore=BUILT, symlinks=True))
        found = [run_cell(source, *each, mend=not options.cheap) for each in track(work, "installing", console=console)]
    table = Table("python", "torch", "install", "got", "mended by what the warning says", "problem")
    for row in found:
        table.add_row(Path(row["python"]).name, row["torch"], row["install"], row["got"], row["mended"], row["problem"])
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(row["problem"] for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
