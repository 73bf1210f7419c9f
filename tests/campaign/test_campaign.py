"""The campaign's short form: fixed seeds of every part, csrc/core under TSan, and proofs that each part can fail.

Cases are few and the same in every run; `make campaign` draws others, and runs as long as it is told to.
"""

import json
from pathlib import Path

import pytest
from support import needs_extension
from warm_python import python, start

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(**needs_extension)


@pytest.fixture(autouse=True)
def warm_children(monkeypatch):
    """Workers begin with torch imported."""
    from campaign import child

    monkeypatch.setattr(child, "starts", start)


@pytest.fixture
def command(capsys, monkeypatch):
    """The campaign as a user runs it, but for the process: its exit status and what it prints."""
    from campaign.__main__ import main

    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")

    def run(*arguments):
        code = main([*arguments])
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def check(command):
    """It finds nothing, and says what it tried."""

    def run(seed, *arguments):
        code, out = command("--seed", str(seed), "--minutes", "20", "--jobs", "1", *arguments)
        assert code == 0, out[-6000:]
        print(out)
        return out

    return run


# The seeds of staleness are some that once found stale outputs: a cache whose hash read parts of large parameters.
@pytest.mark.parametrize(
    "part, cases, seed",
    [("ops", 60, 1), ("described", 12, 1), ("raw", 120, 1), ("staleness", 6, 2000), ("threads", 6, 1)],
)
def test_part(part, cases, seed, check):
    assert f"| {cases} |" in check(seed, "--part", part, "--cases", str(cases))


def test_numeric(check):
    assert "| 10 |" in check(1, "--part", "numeric", "--cases", "10")


def test_core_under_the_thread_sanitizer():
    from campaign.sanitizers import CannotBuild, CoreSweep, build

    try:
        build("core-tsan-baseline", 900)
    except CannotBuild as reason:
        if "not found" in str(reason):
            pytest.skip(f"csrc/core was NOT run under a sanitizer: {reason}")
        raise
    sweep = CoreSweep("core-tsan-baseline", 1).for_seconds(600, most=120)
    assert sweep.cases == 120 and sweep.failures == []


def test_one_case_runs_again_by_its_seed_and_by_its_file(command, tmp_path):
    code, out = command("--part", "ops", "--case", "7")
    assert code == 0 and '"seed": 7' in out
    file = tmp_path / "case.json"
    case = json.loads(out[: out.index("}") + 1])
    file.write_text(json.dumps({"part": "ops", "env": {}, "case": case}))
    assert command("--file", str(file)) == (0, out)


def test_a_wrong_call_is_told():
    done = python("-m", "tests.campaign", "--case", "7", cwd=ROOT)
    assert done.returncode == 2 and "expected one --part that the seed is of" in done.stderr


def test_a_crash_is_a_finding_and_the_next_case_runs():
    """A part whose second case ends the process: the others have outcomes all the same."""
    from campaign.child import Child

    with Child("proof") as child:
        outcomes = [child.run({"seed": 1, "do": do, "size": 9}) for do in ("nothing", "crash", "raise", "wrong")]
    assert [set(outcome.findings) for outcome in outcomes] == [set(), {"crash"}, {"error"}, {"beyond 5x", "float64"}]
    assert "SIGSEGV" in outcomes[1].findings["crash"] and "ZeroDivisionError" in outcomes[2].findings["error"]


def test_failures_are_made_smaller_and_kept(tmp_path, monkeypatch):
    from campaign import sweep as module

    monkeypatch.setattr(module, "OUT", tmp_path)
    swept = module.Sweep(module.Run("proof"), 3).for_seconds(60, jobs=1, most=1)
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("*float64.json"))
    assert swept.cases == 1 and saved["drawn"]["size"] == 83 and saved["case"] == {"seed": 3, "do": "wrong", "size": 1}


def test_a_stale_output_is_seen():
    """A model that keeps its output for good: the first write that torch does not count shows."""
    import torch

    from campaign import staleness

    case = staleness.draw(1) | {"steps": [dict(route="through_data", parameter=0.0, where="all", at=1, large=False)]}
    build, kept = staleness.build, {}

    def forgetful(case, seed):
        built = build(case, seed)
        run = built.run
        built.run = lambda model, **inputs: kept.setdefault(id(model), run(model, **inputs))
        return built

    staleness.build = forgetful
    try:
        torch.manual_seed(0)
        assert set(staleness.run(case).findings) == {"stale"}
    finally:
        staleness.build = build


def test_tables_come_into_the_pages(tmp_path):
    from campaign import report
    from campaign.outcome import Outcome
    from campaign.sweep import Run

    class Swept:
        run, cases, seconds, total, failures = Run("ops", "avx2"), 3, 1.0, Outcome(), []

    Swept.total.counts["results"] = 2000
    Swept.total.find("beyond 5x", "x")
    found = report.record([Swept], {"sanitizers, extension": "no time"}, seed=5, minutes=1)
    for page in report.PAGES:
        (tmp_path / page).write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.write_docs(found, tmp_path)
    written = (tmp_path / "reliability.md").read_text()
    assert "| ops, avx2 | 3 | 1 s | 1 beyond 5x |" in written and "not run: no time" in written and "old" not in written
    assert written.startswith("before\n") and written.endswith("after\n") and "seed 5" in written
    assert report.failed(found) and "| 2,000 | 0 | 1 |" in (tmp_path / "accuracy.md").read_text()


def test_a_share_beyond_twice_is_chance_and_more_is_not():
    from campaign.report import beyond_chance

    assert not beyond_chance({"counts": {"results": 10_000, "beyond 2x": 10}})
    assert beyond_chance({"counts": {"results": 10_000, "beyond 2x": 11}})
    assert not beyond_chance({"counts": {"results": 100, "beyond 2x": 3}})
    assert not beyond_chance({"counts": {"results": 100, "beyond 2x": 4, "cases beyond 2x": 1}})
    assert beyond_chance({"counts": {"results": 100, "beyond 2x": 4, "cases beyond 2x": 2}})
