"""The result on disk, whole at every moment, and the table that people read."""

from __future__ import annotations

from collections import Counter

from rich.table import Table

from benchmarks.output import digits, table, times_ours

OURS = "fast"
COMMANDS = "trials", "sanitizer", "counters", "tuner"  # what a run does beside build, tests and timings
NOT_RUN = {"outcome": "not run"}
SHORT = {"out of memory": "memory", "not run": "-"}
CAPTION = (
    "Median of a call; below it how many times as long as fast it takes (red: fast is the slower one). wrong: further "
    "from float64 than the tolerance, so without a ratio. *: launching the kernels, not running them, took the time. "
    "pairs/s: batch x latents x tokens a second, forward. error: fast's output, and below it the worst gradient."
)


def duration(seconds: float) -> str:
    """Three significant digits, in ms or us."""
    return f"{digits(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{digits(seconds * 1e6)} us"


def cell(side: dict) -> str:
    """Time above ratio, or what there is in place of it."""
    if side["outcome"] != "timed":
        return SHORT.get(side["outcome"], side["outcome"])
    text = duration(side["median"]) + ("*" if side.get("launch_bound") else "")
    if side.get("over_ours") is not None:
        return f"{text}\n{times_ours(side['over_ours'])}"
    return f"{text}\nwrong" if side.get("agrees") is False else text


def errors(side: dict) -> str:
    """Of the output and, below, of the gradients."""
    found = [side.get("relative_error"), side.get("gradient_error")]
    return "\n".join(f"{error:.0e}" for error in found if error is not None) or "-"


def tables(result: dict) -> list[Table]:
    """One for every level that was measured."""
    made = []
    for level in ("op", "model"):
        cases = [case for case in result["cases"] if case.get("level") == level]
        if cases:
            dry = "DRY RUN, tiny sizes: " if result["dry_run"] else ""
            sides = [item for case in cases for item in case["sides"].items()]
            seen = {name for name, side in sides if side["outcome"] != "not run"}  # others are no columns of dashes
            peers = [peer for peer in peers_of(*cases) if peer in seen]
            headers = "geometry\nbatch dtype pass", "fast", "pairs/s", "error", *(p.replace("-", "\n") for p in peers)
            title = f"{dry}{level} level, {result['conditions'].get('device')}"
            lines = [_line(case, peers) for case in cases]
            made.append(table(title, headers, lines, caption=CAPTION, show_lines=True))
    return made


def _line(case: dict, peers: list[str]) -> list[str]:
    ours = case["sides"].get(OURS, NOT_RUN)
    pairs = ours.get("pairs_per_second")
    return [
        f"{case['geometry']}\n{case['batch']} {case['dtype']} {case['pass']}",
        cell(ours),
        f"{pairs / 1e9:.3g} G" if pairs else "-",
        errors(ours),
        *(cell(case["sides"].get(peer, NOT_RUN)) for peer in peers),
    ]


def summary(case: dict) -> str:
    """One line: our time, and the peers' as multiples of it."""
    said = []
    for name in (OURS, *peers_of(case)):
        side = case["sides"].get(name, NOT_RUN)
        if side["outcome"] == "timed":
            ratio = side.get("over_ours")
            said.append(f"{name} {cell(side).splitlines()[0] if ratio is None else f'{ratio:.2f}x'}")
            said[-1] += " WRONG" if side["agrees"] is False else ""
        elif side["outcome"] not in ("not run", "absent"):
            said.append(f"{name} {side['outcome']}")
    return ", ".join(said + case["notes"])


def peers_of(*cases: dict) -> list[str]:
    """All sides but ours, in the order in which they are measured."""
    return [side for side in dict.fromkeys(side for case in cases for side in case["sides"]) if side != OURS]


def skipped_line(result: dict) -> str:
    """What was skipped and why, in one line."""
    reasons = Counter(entry["reason"] for entry in result["skipped"])
    for case in result["cases"]:
        for side, found in case["sides"].items():
            if found["outcome"] != "timed":
                reasons[f"{side}: {found['reason']}"] += 1
        reasons.update(case["notes"])
    return "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common()) or "nothing"


def complaints(result: dict) -> list[str]:
    """What makes the battery fail: failing tests, and cases in which our own side is wrong or did not run."""
    found = [result["outcome"]] if result["outcome"].startswith("failed") else []
    if result["tests"].get("outcome") not in ("passed", "left out", "none ran"):
        found.append(f"tests: {result['tests'].get('outcome')}: {', '.join(result['tests'].get('failed', [])[:5])}")
    for kind in COMMANDS:
        if result.get(kind, {}).get("outcome") in ("failed", "stopped"):
            found.append(f"{kind}: {result[kind]['outcome']}, see {result[kind]['log']}")
    for name, op in result.get("trials", {}).get("ops", {}).items():
        if op["error"]:
            found.append(f"{name}: {op['error']}")
    for case in result["cases"]:
        ours = case["sides"].get(OURS, {})
        if ours.get("outcome") != "timed":
            found.append(f"{case['case']}: fast {ours.get('outcome', 'was not measured')}: {ours.get('reason', '')}")
        elif ours.get("agrees") is False:
            found.append(f"{case['case']}: fast is wrong by {ours['relative_error']:.1e}, {ours['gradient_error']}")
    return found
