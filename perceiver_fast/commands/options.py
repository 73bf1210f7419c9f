"""What the options of several commands have in common."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """An argument that is an int of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number
