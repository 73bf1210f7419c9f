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

import perceiver_fast
from perceiver_fast.insight.console import CannotRun

EXTRA = "pip install -e '.[bench]'"
SUITE = "benchmarks.__main__"
MODES = {"base": "benchmarks.base.__main__", "compare": "benchmarks.compare", "scaling": "benchmarks.scaling.__main__"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options: whatever follows, which :func:`run` reads when the benchmarks were found."""
    parser.description = __doc__
    # Without prefix characters nothing looks like an option of this parser, --help included.
    parser.prefix_chars = "\0"
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def own_parser() -> argparse.ArgumentParser:
    """What to run; the rest of the options are that command's."""
    top = argparse.ArgumentParser(
        prog="perceiver-fast bench",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--base REV | --compare OLD NEW | --scaling] [OPTION ...]",
        epilog="Each takes options of its own: add --help to see them. Without one of them, the suite runs.",
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
    top.add_argument("-h", "--help", action="store_true", help="this, and the options of what is run")
    return top


def find_root() -> Path | None:
    """The folder that holds ``benchmarks``: the package's checkout, or the current directory; None without one."""
    for root in (Path(perceiver_fast.__file__).resolve().parents[1], Path.cwd()):
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
        raise CannotRun(
            "the benchmarks are not installed with the package: clone the repository and run `make bench` there, or run "
            "this command in its folder"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("benchmarks", "perceiver_fast"):
            raise
        raise CannotRun(f"needs {error.name}, which is not installed: {EXTRA}") from None


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code of what was run.

    Raises:
        CannotRun: the benchmarks, or what they need, are not here.
    """
    own = own_parser()
    chosen, rest = own.parse_known_args(args.arguments)
    given = {module: values for mode, module in MODES.items() if (values := getattr(chosen, mode)) is not None}
    ((module, values),) = (given or {SUITE: []}).items()
    if chosen.help:
        rest.append("--help")
        if module == SUITE:
            own.print_help()
            print()
    try:
        command = load(module)
    except CannotRun as error:
        if not chosen.help:
            raise
        print(f"bench: {error}", file=sys.stderr)
        return 0  # help was given, as far as it can be
    return command.main([*values, *rest])
