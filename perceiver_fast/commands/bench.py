"""Time, memory and errors beside the peers; two runs or two commits side by side; scaling curves.

The benchmarks are a part of the repository, not of the installed package: this command finds them beside the package (a
checkout, an editable install) or in the current directory, and hands its options on.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from perceiver_fast import installation
from perceiver_fast.insight.console import CannotRun

SUITE = "benchmarks.__main__"
MODES = {"base": "benchmarks.base.__main__", "compare": "benchmarks.compare", "scaling": "benchmarks.scaling.__main__"}
ABSENT = (
    "the benchmarks come with the source, not with the installed package: clone the repository, and run this command "
    "in its folder"
)
# What the suite takes, for its help: the suite itself needs torch and pytest. A test compares them with the suite's.
SUITE_OPTIONS = {
    "--quick": "one geometry in float32, done in three minutes; nothing is kept but what --json asks for",
    "--geometry NAME": "one to measure, also by torch.compile of the original; repeat for several",
    "--all": "every geometry and dtype",
    "--level LEVEL": "model, layer, or an op by its name; repeat for several (default: all)",
    "--batch N": "inputs at once (default: 1); repeat for several",
    "--dtype DTYPE": "float32, bfloat16, .. (default: float32); repeat for several",
    "--pass PASS": "forward, step or step+tokens (default: all); repeat for several",
    "--threads N": "torch's threads",
    "--only EXPRESSION": 'as pytest -k takes it: "not (sdpa or compile)"',
    "--json PATH": "where the numbers go",
}


def own_parser() -> argparse.ArgumentParser:
    """What to run; the rest of the options are that command's."""
    top = argparse.ArgumentParser(
        prog="perceiver-fast bench",
        description=(__doc__ or "").split("\n")[0],
        usage="%(prog)s [--base REV | --compare OLD NEW | --scaling] [OPTION ...]",
        epilog="--base, --compare and --scaling take options of their own: add --help to see them.",
        add_help=False,
        allow_abbrev=False,
    )
    which = top.add_mutually_exclusive_group()
    # Each is a list: what its command takes first.
    which.add_argument("--base", nargs=1, metavar="REV", help="this checkout beside another of its commits, in turns")
    compare = "two stored results: what changed, what is noise"
    which.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help=compare)
    scaling = "time and memory as tokens or latents grow, with pictures"
    which.add_argument("--scaling", action="store_const", const=[], help=scaling)
    top.add_argument("-h", "--help", action="store_true", help="this; with one of the above, what it takes")
    return top


def help_text() -> str:
    """The help of the command, with the suite's options, which :func:`own_parser` hands on."""
    top = own_parser()
    suite = top.add_argument_group("options of the suite, which runs without any of these")
    for option, text in SUITE_OPTIONS.items():
        flag, _, metavar = option.partition(" ")
        if metavar:
            suite.add_argument(flag, metavar=metavar, help=text)
        else:
            suite.add_argument(flag, action="store_true", help=text)
    return top.format_help()


def find_root() -> Path | None:
    """The folder that holds ``benchmarks``: the package's checkout, or the current directory; None without one."""
    for root in (installation.PACKAGE.parent, Path.cwd()):
        if (root / "benchmarks/__main__.py").exists() and (root / "perceiver_fast/__init__.py").exists():
            return root
    return None


def load(module: str) -> ModuleType:
    """Import a module of ``benchmarks``.

    Raises:
        CannotRun: there are no benchmarks, or they need a package that is not installed.
    """
    root = find_root()
    if root is None:
        raise CannotRun(ABSENT)
    installation.load()
    package = root / "perceiver_fast"
    if package != installation.PACKAGE and not (package / "libperceiver_fast.so").exists():
        raise CannotRun(
            f"the benchmarks import the package of {root}, which has no kernels: run `pip install -e .` there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "perceiver_fast"):
            raise
        raise CannotRun(f"needs {error.name}, which is not installed: {installation.install('bench')}") from None


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code of what was run.

    Raises:
        CannotRun: the benchmarks, or what they need, are not here.
    """
    own = own_parser()
    chosen, rest = own.parse_known_args(args.arguments)
    given = {module: values for mode, module in MODES.items() if (values := getattr(chosen, mode)) is not None}
    ((module, values),) = (given or {SUITE: []}).items()
    if chosen.help and module == SUITE:
        print(help_text(), end="")
        if find_root() is None:
            print(f"bench: {ABSENT}", file=sys.stderr)
        return 0
    if chosen.help:
        rest.append("--help")
    return load(module).main([*values, *rest])
