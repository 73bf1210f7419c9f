"""Two results side by side: what counts as a change, what is noise, and what a reader sees. Nothing is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

from benchmarks import compare, compare_view


def row(peer, seconds, **changes):
    return {
        "level": "model", "geometry": "cross-only", "pass": "step", "peer": peer, "batch": 1, "dtype": "float32",
        "threads": 2, "median": seconds, "q1": 0.99 * seconds, "q3": 1.01 * seconds, "min": 0.98 * seconds, "rounds": 5,
        "relative_error": 1e-6, "gradient_error": 2e-5, "peak_memory_bytes": 30 * 2**20, **changes,
    }  # fmt: skip


def stored(path, *rows, missing=(), **conditions):
    conditions = {"cpu": "Xeon", "torch": "2.13", "load_at_start": 0.1, "git_commit": path.stem} | conditions
    path.write_text(json.dumps({"conditions": conditions, "rows": rows, "missing": missing}))
    return path


@pytest.fixture
def verdicts(tmp_path):
    """Verdicts by peer of two lists of rows."""

    def compared(old, new, **options):
        old, new = (compare.load(stored(tmp_path / f"{name}.json", *rows)) for name, rows in (("a", old), ("b", new)))
        return {row["peer"]: row["verdict"] for row in compare.compare(old, new, **options)["rows"]}

    return compared


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(1.3, "slower"), (1.08, "same"), (1.0, "same"), (0.93, "same"), (0.7, "faster")]
)
def test_a_change_counts_beyond_the_threshold(verdicts, seconds, verdict):
    assert verdicts([row("fast", 1.0)], [row("fast", seconds)]) == {"fast": [verdict]}


def test_the_threshold_is_the_users(verdicts):
    assert verdicts([row("fast", 1.0)], [row("fast", 1.08)], threshold=0.05) == {"fast": ["slower"]}


@pytest.mark.parametrize(
    "spread", [{"q1": 0.9, "q3": 1.5}, {"q1": None, "q3": None, "iqr": 0.7, "min": 0.5},
               {"q1": None, "q3": None, "min": 0.95}]
)  # fmt: skip
def test_spreads_that_overlap_are_noise(verdicts, spread):
    assert verdicts([row("fast", 1.0)], [row("fast", 1.3, **spread)]) == {"fast": ["same"]}


def test_spread_uses_the_best_that_a_row_holds():
    assert compare.spread(row("fast", 1.0)) == (0.99, 1.01)
    assert compare.spread({"median": 1.0, "iqr": 0.2, "min": 0.5}) == (0.9, 1.1)
    assert compare.spread({"median": 1.0, "iqr": 0.2, "min": 0.95}) == (0.95, 1.1)  # nothing is faster than the fastest
    assert compare.spread({"median": 1.0, "min": 0.8}) == (0.8, 1.0)
    assert compare.spread({"median": 1.0}) == (1.0, 1.0)


def test_what_the_machine_did_is_taken_out(verdicts):
    old = [row("eager", 2.0), row("sdpa", 1.0), row("fast", 0.1)]
    slow_machine = [row("eager", 3.0), row("sdpa", 1.5), row("fast", 0.15)]
    assert verdicts(old, slow_machine) == {"eager": ["same"], "sdpa": ["same"], "fast": ["same"]}
    assert verdicts(old, [*slow_machine[:2], row("fast", 0.1)])["fast"] == ["faster"]
    assert verdicts([old[-1]], [slow_machine[-1]])["fast"] == ["slower"]  # nothing tells that it was the machine


def test_peers_that_disagree_raise_the_threshold(verdicts):
    old = [row("eager", 1.0), row("sdpa", 1.0), row("fast", 1.0)]
    new = [row("eager", 0.8), row("sdpa", 1.25), row("fast", 1.3)]
    assert verdicts(old, new)["fast"] == ["same"]


def test_what_is_partly_ours_is_no_witness_of_the_machine(tmp_path):
    rows = [row("reference", 1.0, level="op"), row("smart-dense", 1.0), row("fast", 1.0), row("fast-pinned", 1.0)]
    result = compare.load(stored(tmp_path / "a.json", *rows))
    assert compare.compare(result, result)["machine"] is None


def test_memory_and_errors_have_verdicts(verdicts):
    old = [row("fast", 1.0)]
    assert verdicts(old, [row("fast", 1.0, peak_memory_bytes=60 * 2**20)])["fast"] == ["same", "more memory"]
    assert verdicts(old, [row("fast", 1.0, peak_memory_bytes=2 * 2**20)])["fast"] == ["same", "less memory"]
    assert verdicts(old, [row("fast", 1.0, peak_memory_bytes=None)])["fast"] == ["same"]
    assert verdicts(old, [row("fast", 1.0, gradient_error=5e-5)])["fast"] == ["same", "less exact"]
    tiny = row("fast", 1.0, peak_memory_bytes=2**10, relative_error=1e-9)
    larger = row("fast", 1.0, peak_memory_bytes=2**19, relative_error=9e-7)
    assert verdicts([tiny], [larger])["fast"] == ["same"]  # page counts and float32's rounding


def test_rows_match_across_the_formats(tmp_path):
    without_batch = row("fast", 1.0, **{"pass": "forward-bf16", "dtype": "bfloat16"})
    del without_batch["batch"]
    old = compare.load(stored(tmp_path / "a.json", without_batch))
    new = compare.load(stored(tmp_path / "b.json", row("fast", 1.0, **{"pass": "forward", "dtype": "bfloat16"})))
    (only,) = compare.compare(old, new)["rows"]
    assert only["verdict"] == ["same"] and only["pass"] == "forward" and only["batch"] == 1


def test_committed_results_compare_with_themselves(capsys):
    path = str(ROOT / "benchmarks/results/intel-xeon-processor-2026-11-22.json")
    assert compare.main([path, path, "--json", "--fail"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] and {tuple(row["verdict"]) for row in found["rows"]} == {("same",)}
    assert found["machine"]["factor"] == 1.0 and found["regressions"] == 0


def test_rows_of_one_file_say_why_the_other_has_none(tmp_path, capsys):
    old = stored(tmp_path / "old.json", row("fast", 1.0), row("eager", 1.0), row("sdpa", 1.0))
    failed = {"level": "model", "geometry": "cross-only", "pass": "step", "peer": "fast", "outcome": "failed",
              "reason": "the output is off"}  # fmt: skip
    skipped = failed | {"peer": "sdpa", "outcome": "skipped", "reason": "no memory"}
    new = stored(tmp_path / "new.json", row("eager", 1.0), row("compile", 1.0), missing=[failed, skipped])
    assert compare.main([str(old), str(new), "--json", "--fail"]) == 1
    rows = {row["peer"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["fast"]["verdict"] == ["only in old", "failed"] and rows["fast"]["regression"]
    assert rows["sdpa"]["verdict"] == ["only in old"] and rows["sdpa"]["note"] == "no memory"
    assert rows["compile"]["verdict"] == ["only in new"] and not rows["compile"]["regression"]
    lost = failed | {"level": "every level", "pass": "every pass", "peer": "every peer", "batch": 1, "dtype": "float32"}
    new = stored(tmp_path / "new.json", row("eager", 1.0, geometry="readme"), missing=[lost])
    key = ("model", "cross-only", "forward", 4, "bfloat16", "fast")
    assert compare.why_missing(key, compare.load(new)) == lost
    other = stored(tmp_path / "new.json", missing=[failed | {"pass": "forward-bf16"}])
    assert compare.why_missing(key, compare.load(other)) is None  # of a batch of 1
    assert compare.why_missing((*key[:3], 1, *key[4:]), compare.load(other))["peer"] == "fast"


def test_conditions_that_differ_are_said_first(tmp_path, capsys):
    old = stored(tmp_path / "old.json", row("fast", 1.0), governor="performance")
    new = stored(tmp_path / "new.json", row("fast", 2.0), cpu="EPYC", torch="2.14", load_at_start=3.2, date="later")
    assert compare.main([str(old), str(new)]) == 0  # a regression, but --fail was not asked for
    text = capsys.readouterr().out
    expected = ["cpu differs: Xeon, then EPYC", "torch differs: 2.13, then 2.14", "new run began: load 3.2"]
    positions = [text.index(line) for line in expected]
    assert positions == sorted(positions) and positions[-1] < text.index("old → new")
    assert text.count("warning:") == 3 and "slower" in text and "1 regression of ours." in text
    assert compare.main([str(old), str(new), "--fail"]) == 1


def test_markdown_is_a_table_with_all_rows(tmp_path, capsys):
    rows = [row("eager", 3.0), row("fast", 1.0, batch=4), row("fast", 1.0, level="op", gradient_error=None)]
    old, new = (stored(tmp_path / f"{name}.json", *rows) for name in ("old", "new"))
    out = tmp_path / "table.md"
    assert compare.main([str(old), str(new), "--markdown", str(out)]) == 0
    lines = out.read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 * 2 + len(rows) and {line.count("|") for line in table} == {len(compare_view.HEADERS) + 1}
    assert (
        "| cross-only step, batch 4 | fast | 1,000 ms | 1,000 ms | 1.00x | 1.00x | 30 MiB → 30 MiB |" in out.read_text()
    )
    assert "1.0e-06 → 1.0e-06<br>2.0e-05 → 2.0e-05" in out.read_text() and lines[-1] == "0 regressions of ours."
    assert "batch 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected a result of python -m benchmarks --json"),
        ("[]", 'with "rows", got none'),
        ('{"benchmarks": []}', "pytest-benchmark compare"),
        ('{"rows": [{"peer": "fast"}]}', "expected every row to have level, geometry"),
        (json.dumps({"rows": [row("fast", 1.0), row("fast", 2.0)]}), "expected one row for model cross-only step"),
        (json.dumps({"rows": [row("fast", 0.0)]}), "expected medians of more than 0 seconds"),
        (json.dumps({"rows": [row("other", 1.0)]}), "no row in common"),
        (None, "No such file"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capsys, content, expected):
    good, bad = stored(tmp_path / "good.json", row("fast", 1.0)), tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    assert compare.main([str(good), str(bad)]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err and not captured.out


def test_a_threshold_below_zero_is_refused(tmp_path, capsys):
    good = str(stored(tmp_path / "good.json", row("fast", 1.0)))
    assert compare.main([good, good, "--threshold", "-0.1"]) == 2
    assert "at least 0, got -0.1" in capsys.readouterr().err
