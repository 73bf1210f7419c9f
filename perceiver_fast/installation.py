"""How this package was started and installed; needs nothing but Python, and imports nothing of the package.

The command line reads its arguments before torch is imported, which takes seconds: help and usage errors come at once.
``python -m perceiver_fast`` and ``perceiver-fast`` import the package before anything of the command line can run, so
the package itself asks :func:`deferred` whether to wait. Everywhere else it is whole as soon as it is imported.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

PACKAGE = Path(__file__).resolve().parent


def is_command_line(arguments: list[str], original: list[str]) -> bool:
    """Whether a process is the command line: ``python -m perceiver_fast ..`` or ``perceiver-fast ..``.

    Args:
        arguments: ``sys.argv``; its first is ``-m`` while Python looks for the module that it will run.
        original: ``sys.orig_argv``, with Python's own options.

    Example:
        >>> is_command_line(["-m", "info"], ["python", "-m", "perceiver_fast", "info"])
        True
        >>> is_command_line(["train.py", "--help"], ["python", "train.py", "--help"])
        False
    """
    if not arguments:
        return False
    if arguments[0] == "-m":
        return original[-len(arguments) :][:1] == ["perceiver_fast"]
    return Path(arguments[0]).stem == "perceiver-fast"


_deferred = is_command_line(getattr(sys, "argv", []), sys.orig_argv)


def deferred() -> bool:
    """Whether the package waits until something of it is needed: the command line reads its arguments."""
    return _deferred


def load() -> None:
    """Import all of the package now, if that was deferred."""
    global _deferred
    if _deferred:
        _deferred = False
        package = sys.modules["perceiver_fast"]
        del package.__getattr__
        importlib.reload(package)


def attribute(name: str) -> Any:
    """What the package's ``__getattr__`` gives while it waits: the first name that is asked for makes it whole."""
    if name.startswith("__"):  # Python's own questions
        raise AttributeError(f"module 'perceiver_fast' has no attribute {name!r}")
    load()
    return getattr(sys.modules["perceiver_fast"], name)


def checkout() -> Path | None:
    """The folder of the repository that this package is in; None where it was installed from a wheel."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").exists() and (root / "csrc").exists() else None


def origin() -> str:
    """What pip installed this package from: the path of a folder or file, ``.`` in a clone that never was, or its name."""
    try:
        url = json.loads(metadata.distribution("perceiver-fast").read_text("direct_url.json") or "{}").get("url", "")
    except metadata.PackageNotFoundError:
        url = ""
    if url.startswith("file://"):
        path = Path(unquote(urlparse(url).path))
        return "." if path == Path.cwd() else str(path)
    return "." if checkout() else "perceiver-fast"


def elsewhere() -> Path | None:
    """The folder of another copy of this package, which was installed with kernels; None where there is none.

    In a clone, Python takes the clone's own folder, which has no kernels unless it was installed with ``-e``.
    """
    if checkout() is None:
        return None
    for folder in map(Path, sys.path):
        found = folder / "perceiver_fast"
        if (found / "libperceiver_fast.so").exists() and found.resolve() != PACKAGE:
            return found
    return None


def install(extra: str) -> str:
    """The command that installs one of the package's extras here."""
    return f"pip install -e '.[{extra}]'" if checkout() else f"pip install 'perceiver-fast[{extra}]'"
