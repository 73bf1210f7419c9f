"""A revision of this checkout in a folder of its own, built, for as long as it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.process import run_command
from perceiver_fast.insight.console import CannotRun

SHOWN_LINES = 15  # of a build that failed


def git(root: Path, *arguments: str, check: bool = True) -> str | None:
    """What git prints; None when it refuses and ``check`` is False.

    Raises:
        CannotRun: git is missing, or refuses.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotRun("git was not found: it holds the revision to compare with") from None
    if done.returncode and check:
        raise CannotRun(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return None if done.returncode else done.stdout.strip()


def commit_of(root: Path, revision: str) -> str:
    """The full name of the commit that ``revision`` names in the checkout ``root``.

    Raises:
        CannotRun: ``root`` is no checkout, knows no such revision, or the revision holds no package.
    """
    top = git(root, "rev-parse", "--show-toplevel", check=False)
    if not top or Path(top).resolve() != root.resolve():
        raise CannotRun(f"expected a git checkout in {root}, got none: clone the repository and run this there")
    name = f"{revision}^{{commit}}"
    commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", name, check=False)
    if not commit or git(root, "cat-file", "-e", f"{commit}:perceiver_fast/__init__.py", check=False) is None:
        raise CannotRun(
            f"expected a revision of this checkout that has the package, got {revision!r}: `git log` lists them, "
            "`git fetch` gets those of the remote"
        )
    return commit


def is_dirty(root: Path) -> bool:
    """Whether files differ from the checked-out commit, or are not in it."""
    return bool(git(root, "status", "--porcelain"))


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A temporary folder that holds the commit's files in ``tree``; gone afterwards, whatever happens."""
    with tempfile.TemporaryDirectory(prefix="perceiver-fast-base-", ignore_cleanup_errors=True) as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            git(root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", str(tree), commit)
            yield tree.parent
        finally:
            git(root, "worktree", "remove", "--force", str(tree), check=False)
            git(root, "worktree", "prune")


def build(tree: Path, folder: Path, report: Callable[[str], object]) -> None:
    """Build the extension of ``tree`` in place, its objects in ``folder``; PERCEIVER_FAST_SKIP_BUILD=1 leaves it out.

    Args:
        report: called with lines of progress.

    Raises:
        CannotRun: the build failed; the message holds the end of what it printed.
    """
    environment = {**os.environ, "PERCEIVER_FAST_SKIP_CUDA_BUILD": "1"}  # the CPU is what is measured
    if environment.get("PERCEIVER_FAST_SKIP_BUILD", "") in ("", "0"):
        environment["PERCEIVER_FAST_FORCE_BUILD"] = "1"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(folder)]
    last: deque[str] = deque(maxlen=SHOWN_LINES)

    def printed(line: str) -> None:
        last.append(line.rstrip())
        report(last[-1])

    code, _ = run_command(command, tree, printed, environment)
    if code:
        raise CannotRun("\n".join([f"the build of the base failed, exit code {code}:", *last]))


def stale_source(tree: Path) -> Path | None:
    """A C++ source of ``tree`` that is newer than its built extension; None when there is none, or no extension."""
    built = [path.stat().st_mtime for path in (tree / "perceiver_fast").glob("_C*.so")]
    sources = (path for path in sorted((tree / "csrc").rglob("*")) if path.suffix in (".cpp", ".h"))
    return next((path for path in sources if built and path.stat().st_mtime > max(built)), None)
