"""How this package was started and installed; needs nothing but Python, and imports nothing of the package.

The command line reads its arguments before torch is imported, which takes seconds: help and usage errors come at once.
``python -m perceiver_fast`` and ``perceiver-fast`` import the package before anything of the command line can run, so
the package itself asks :func:`deferred` whether to wait. Everywhere else it is whole as soon as it is imported.
"""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

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
    return Path(arguments[0]).name in ("perceiver-fast", "perceiver-fast.exe", "perceiver-fast-script.py")


# A worker that such a process spawns has its arguments, but not yet a main module with a file.
_deferred = is_command_line(getattr(sys, "argv", []), sys.orig_argv) and (
    sys.argv[0] == "-m" or hasattr(sys.modules.get("__main__"), "__file__")
)


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
    """What pip installed this package from, as it is typed: a folder (with ``-e``), a file, an address, or its name."""
    try:
        information = json.loads(metadata.distribution("perceiver-fast").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        information = {}
    editable = "-e " if information.get("dir_info", {}).get("editable") else ""
    url = information.get("url", "")
    if url.startswith("file:"):
        path = Path(url2pathname(urlparse(url).path))
        return editable + ("." if path == Path.cwd() else shlex.quote(str(path)))
    if url:
        return shlex.quote(f"{information.get('vcs_info', {}).get('vcs', '')}+{url}".lstrip("+"))
    return "-e ." if checkout() else "perceiver-fast"


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
