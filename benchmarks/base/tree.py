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

SHOWN_LINES = 15  # of a build that failed


class CannotMeasure(Exception):
    """Nothing can be measured; the message says why and what to do."""


def git(root: Path, *arguments: str) -> str:
    """What git prints.

    Raises:
        CannotMeasure: git is missing, or refuses.
    """
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], check=False, capture_output=True, text=True)
    except FileNotFoundError:
        raise CannotMeasure("git was not found: it holds the revision to compare with") from None
    if done.returncode:
        raise CannotMeasure(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(root: Path, revision: str) -> str:
    """The full name of the commit that ``revision`` names in the checkout ``root``.

    Raises:
        CannotMeasure: ``root`` is no checkout, knows no such revision, or the revision holds no package.
    """
    try:
        top = git(root, "rev-parse", "--show-toplevel")
    except CannotMeasure as error:
        if "was not found" in str(error):
            raise
        top = ""
    if not top or Path(top).resolve() != root.resolve():
        raise CannotMeasure(f"expected a git checkout in {root}, got none: clone the repository and run this there")
    try:
        commit = git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
        git(root, "cat-file", "-e", f"{commit}:perceiver_fast/__init__.py")
    except CannotMeasure:
        raise CannotMeasure(
            f"expected a revision of this checkout that has the package, got {revision!r}: `git log` lists them, "
            "`git fetch` gets those of the remote"
        ) from None
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
            subprocess.run(
                ["git", "-C", str(root), "worktree", "remove", "--force", str(tree)], check=False, capture_output=True
            )
            git(root, "worktree", "prune")


def build(tree: Path, folder: Path, report: Callable[[str], object]) -> None:
    """Build the extension of ``tree`` in place, its objects in ``folder``; PERCEIVER_FAST_SKIP_BUILD=1 leaves it out.

    Args:
        report: called with lines of progress.

    Raises:
        CannotMeasure: the build failed; the message holds the end of what it printed.
    """
    environment = {**os.environ, "PERCEIVER_FAST_SKIP_CUDA_BUILD": "1"}  # the CPU is what is measured
    if environment.get("PERCEIVER_FAST_SKIP_BUILD", "") in ("", "0"):
        environment["PERCEIVER_FAST_FORCE_BUILD"] = "1"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(folder)]
    last: deque[str] = deque(maxlen=SHOWN_LINES)
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                last.append(line.rstrip())
                report(last[-1])
        except BaseException:
            process.terminate()  # or it would be waited for
            raise
    if process.returncode:
        raise CannotMeasure("\n".join([f"the build of the base failed, exit code {process.returncode}:", *last]))


def stale_source(tree: Path) -> Path | None:
    """A C++ source of ``tree`` that is newer than its built extension; None when there is none, or no extension."""
    built = [path.stat().st_mtime for path in (tree / "perceiver_fast").glob("_C*.so")]
    sources = (path for path in sorted((tree / "csrc").rglob("*")) if path.suffix in (".cpp", ".h"))
    return next((path for path in sources if built and path.stat().st_mtime > max(built)), None)
