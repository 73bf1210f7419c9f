"""The battery's two runs for a GPU that one has for minutes, without a GPU: their dry runs, and what ends a step."""

import json
import os
import sys
import time

import pytest
from test_gpu_battery import battery

from benchmarks.gpu import cases, record, runs
from benchmarks.gpu.steps import Steps
from benchmarks.gpu.worker import Worker, WorkerLost


def test_runs_fit_their_time():
    for seconds, steps in runs.RUNS.values():
        assert sum(step.seconds for step in steps) <= seconds - runs.MARGIN
        assert {step.kind for step in steps} <= {"tests", "timings", *record.COMMANDS}
        names = [case.name for step in steps for case in step.cases]
        assert len(names) == len(set(names)) and not set(names) & {case["case"] for case in cases.select()[1]}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """compute-sanitizer and ncu that only run what they are given."""
    for name in ("compute-sanitizer", "ncu"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text('#!/bin/sh\nuntil [ "$1" = "$PYTHON" ]; do shift; done\nexec "$@"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", sys.executable)


@pytest.mark.parametrize("name", runs.RUNS)
def test_dry_run_of_what_is_run_on_a_gpu(name, tools, tmp_path):
    """Its steps and commands, with the sizes and devices that there are."""
    pytest.importorskip("triton")
    output = battery("--run", name, "--out", tmp_path, "--device", "cpu", "--commit", "known")
    result = json.loads((tmp_path / "battery.json").read_text())
    steps = runs.RUNS[name][1]
    assert result["outcome"] == "complete" and result["conditions"]["git_commit"] == "known"
    assert [case["case"] for case in result["cases"]] == [step.cases[0].name for step in steps if step.cases]
    for step in steps:
        if step.kind != "timings":
            assert result[step.kind]["outcome"] == "passed", (step.kind, result[step.kind], output[-3000:])
    assert len(list(tmp_path.glob("*.*"))) <= 8  # as many files as come back from the machine that was planned for
    if name == "first":
        assert result["trials"]["ops"]["geglu"]["error"] == "" and result["tests"]["tests"] > 0


def test_a_step_leaves_what_it_did_not_need_to_the_next(tmp_path, monkeypatch):
    given, now = [], time.monotonic()
    monkeypatch.setattr(Steps, "tool", lambda self, step, until: given.append(round(until - now)))
    doing = Steps(tmp_path, {"cases": [], "skipped": [], "conditions": {}, "outcome": "running"}, None, "none")
    doing.run([runs.Step("trials", 10), runs.Step("sanitizer", 20), runs.Step("tuner", 30)], now + 60)
    assert given == [10, 30, 60] and json.loads((tmp_path / "battery.json").read_text())["outcome"] == "complete"


def test_what_cannot_be_timed_leaves_the_other_steps(tmp_path, monkeypatch):
    def start(self):
        raise WorkerLost("no device", "")

    monkeypatch.setattr(Worker, "start", start)
    monkeypatch.setattr(Steps, "tests", lambda self, step, until: self.result.update(tests={"outcome": "passed"}))
    result = {"cases": [], "skipped": [], "conditions": {}, "outcome": "running"}
    steps = [runs.Step("timings", 10, (cases.parse_case("op/readme/8/bf16/forward"),)), runs.Step("tests", 10)]
    Steps(tmp_path, result, None, "none").run(steps, time.monotonic() + 60)
    assert result["outcome"] == "failed: no device" and result["tests"]["outcome"] == "passed"
    assert [entry["case"] for entry in result["skipped"]] == ["op/readme/8/bf16/forward"]


def test_kernels_that_fail_their_trial_or_a_tool_are_complaints():
    result = {"outcome": "complete", "cases": [], "tests": {"outcome": "passed"}}
    result |= {"trials": {"outcome": "failed", "log": "trials.log", "ops": {"geglu": {"error": "off by 1"}}}}
    result |= {"sanitizer": {"outcome": "left out"}, "tuner": {"outcome": "stopped", "log": "tuner.log"}}
    said = ["trials: failed, see trials.log", "tuner: stopped, see tuner.log", "geglu: off by 1"]
    assert record.complaints(result) == said
