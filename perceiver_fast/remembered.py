"""What one process found out and later ones need not: a small file each in the user's cache folder.

Nothing depends on it: a folder that cannot be written or read is as good as an empty one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def folder() -> Path | None:
    """``$XDG_CACHE_HOME/perceiver_fast``, or ``~/.cache/perceiver_fast``; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # of a user without one
        return None
    return root / "perceiver_fast"


def file(of: Mapping[str, str]) -> Path | None:
    """Where the answer to a question is kept; its name begins with the question's first words, for people."""
    root = folder()
    if root is None:
        return None
    text = json.dumps(dict(of), sort_keys=True)
    words = "-".join(list(of.values())[:3])
    return root / f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def recall(of: Mapping[str, str]) -> str | None:
    """The answer to a question, all of whose facts are in ``of``; None where none is known."""
    place = file(of)
    if place is None:
        return None
    try:
        kept = json.loads(place.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("of") != dict(of):
        return None
    answer = kept.get("answer")
    return answer if isinstance(answer, str) else None


def remember(of: Mapping[str, str], answer: str) -> Path | None:
    """Keep an answer, if that can be; returns where. The file is whole at every moment, whoever else writes it."""
    place = file(of)
    if place is None:
        return None
    new = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        number, new = tempfile.mkstemp(dir=place.parent, prefix=".new-")
        with os.fdopen(number, "w") as stream:
            json.dump({"of": dict(of), "answer": answer}, stream, indent=1)
        os.replace(new, place)
    except OSError:
        if new is not None:
            with contextlib.suppress(OSError):
                os.unlink(new)
        return None
    return place
