"""The command line, one module for each command: ``run(args) -> exit code``. Their options are in ``options.py``.

Exit codes: 0, it ran and all is well; 1, it ran and found a problem; 2, it could not run, and standard error says why.
"""

from pathlib import Path

from perceiver_fast.insight.console import CannotRun


def make_folder(folder: Path) -> None:
    """Make a folder for what a command leaves, unless it is there.

    Raises:
        CannotRun: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(str(error)) from None
