"""Failing cases made smaller: every number, flag and list of a case, as long as it still fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator


def simpler(value: object) -> Iterator[object]:
    """Values that are simpler than this one, the simplest first."""
    if isinstance(value, bool):
        if value:
            yield False
    elif isinstance(value, int):
        yield from (n for n in (0, 1, 2, value // 2, value - 1) if 0 <= n < value)
    elif isinstance(value, float):
        yield from (x for x in (0.0, 1.0) if x != value)
        if abs(value) not in (0.0, 1.0):
            rounded = float(f"{value:.0e}")
            yield from [rounded] if rounded != value else []
    elif isinstance(value, list):
        for index in range(len(value)):
            if len(value) > 1:
                yield value[:index] + value[index + 1 :]
        for index, part in enumerate(value):
            yield from (value[:index] + [new] + value[index + 1 :] for new in simpler(part))


def shrink(case: dict, fails: Callable[[dict], bool], plain: dict[str, str], seconds: float) -> dict:
    """The smallest case that was found in a given time.

    Args:
        case: fails.
        fails: whether a case fails in the same way. One that cannot be does not.
        plain: for keys whose values are words, the simplest word.
        seconds: for all of it.

    Example:
        >>> shrink({"n": 40, "kind": "odd"}, lambda case: case["n"] > 6, {"kind": "even"}, 5)
        {'n': 7, 'kind': 'even'}
    """
    deadline, smaller = time.monotonic() + seconds, True
    while smaller:
        smaller = False
        for key in [key for key in case if key != "seed"]:
            value = case[key]
            choices = [plain[key]] if isinstance(value, str) and plain.get(key, value) != value else simpler(value)
            for choice in choices:
                if time.monotonic() > deadline:
                    return case
                if fails(case | {key: choice}):
                    case, smaller = case | {key: choice}, True
                    break
    return case
