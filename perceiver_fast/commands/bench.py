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

EXTRA = "pip install -e '.[bench]'"
MODES = {"base": "benchmarks.base.__main__", "compare": "benchmarks.compare", "scaling": "benchmarks.scaling.__main__"}
SUITE = "benchmarks.__main__"


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
    which.add_argument("--base", metavar="REV", help="this checkout beside another of its commits, in turns")
    which.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="two stored results: what changed, what is noise"
    )
    which.add_argument(
        "--scaling", action="store_true", help="time and memory as tokens or latents grow, with pictures"
    )
    top.add_argument("-h", "--help", action="store_true", help="this, and the options of what is run")
    return top


def find_root() -> Path | None:
    """The folder that holds ``benchmarks``: the package's checkout, or the current directory; None without one."""
    for root in (Path(perceiver_fast.__file__).resolve().parents[1], Path.cwd()):
        if (root / "benchmarks/__main__.py").exists() and (root / "perceiver_fast/__init__.py").exists():
            return root
    return None


class CannotRun(Exception):
    """The benchmarks, or what they need, are not here; the message says what to do."""


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
    """Run the command; returns the exit code of what was run, or 2 where the benchmarks or their needs are missing."""
    own = own_parser()
    chosen, rest = own.parse_known_args(args.arguments)
    mode = next((name for name in MODES if getattr(chosen, name) not in (None, False)), None)
    if chosen.help:
        rest.append("--help")
        if mode is None:
            own.print_help()
            print()
    try:
        command = load(MODES.get(mode, SUITE))
    except CannotRun as error:
        print(f"bench: {error}", file=sys.stderr)
        return 0 if chosen.help else 2  # help was given, as far as it can be
    return command.main([*_values(chosen, mode), *rest])


def _values(chosen: argparse.Namespace, mode: str | None) -> list[str]:
    """The chosen mode's own values, which its command takes first."""
    return {"base": [chosen.base], "compare": chosen.compare}.get(mode, [])
