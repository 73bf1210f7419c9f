"""Where a model's time goes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.description = __doc__


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    raise NotImplementedError
