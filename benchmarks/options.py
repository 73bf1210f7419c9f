"""Options that small benchmarks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.environment import DEFAULT_THREADS
from perceiver_fast.insight.console import positive


def options(name: str, description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with ``--threads`` and ``--json``, and with ``--rounds`` where these have a default.

    Args:
        name: of the module in benchmarks.
        description: for ``--help``.
        rounds: the default number of timed calls. Default: there is no such option.
    """
    top = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    top.add_argument("--threads", type=positive, default=DEFAULT_THREADS, help="torch's threads (default: %(default)s)")
    if rounds is not None:
        top.add_argument("--rounds", type=positive, default=rounds, help="timed calls of each (default: %(default)s)")
    top.add_argument("--json", type=Path, help="where to keep the numbers (default: they are only printed)")
    return top
