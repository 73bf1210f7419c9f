"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from perceiver_fast.commands import CannotRun


def positive(text: str) -> int:
    """An argument that is an int of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def make_folder(folder: Path) -> None:
    """Make a folder for what a command leaves, unless it is there.

    Raises:
        CannotRun: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(str(error)) from None
