"""The GPU battery without a GPU: a dry run at tiny sizes, and what it does when something goes wrong. Nothing is timed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

pytest.importorskip("psutil")

import gpu_battery_stub  # noqa: E402
from rich.console import Console  # noqa: E402
from warm_python import python

from benchmarks import gpu_battery, output  # noqa: E402
from benchmarks.gpu import cases, check, clock, measure_case, prepare, record, sides  # noqa: E402
from benchmarks.gpu.problem import Problem  # noqa: E402
from benchmarks.gpu.worker import Worker  # noqa: E402
from benchmarks.sides import Peer  # noqa: E402
from perceiver_fast.insight.geometries import GEOMETRIES  # noqa: E402

CPU = torch.device("cpu")
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu_battery.py")]
DRY = ["--device", "cpu", "--no-build", "--no-tests"]


def battery(*arguments, code=0):
    done = python(*COMMAND[1:], *arguments)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def measured(name, **options):
    return measure_case.measure_case(cases.parse_case(name), CPU, dry=True, compile_mode="none", **options)


def test_dry_run_is_complete(tmp_path):
    names = ["op/imagenet-lucid/8/bf16/forward", "op/imagenet-paper/1/fp32/step", "op/video/1/fp32/step",
             "op/flow/8/bf16/step", "model/readme/1/fp32/step", "model/hf-fourier/8/bf16/forward"]  # fmt: skip
    options = [part for name in names for part in ("--case", name)]
    output = battery("--out", tmp_path, *DRY, "--commit", "known", *options)
    result = json.loads((tmp_path / "battery.json").read_text())
    assert result["outcome"] == "complete" and result["dry_run"] and not result["skipped"]
    conditions = result["conditions"]
    assert conditions["git_commit"] == "known" and conditions["packages"]["torch"] == torch.__version__
    assert {"device", "cuda", "date", "clocks_at_start", "clocks_at_end", "perceiver_fast"} <= set(conditions)
    assert result["command"].startswith("python benchmarks/gpu_battery.py --out DIR --device cpu")
    assert "--case op/video" in result["command"] and [case["case"] for case in result["cases"]] == names
    for case in result["cases"]:
        assert case["ours"]["path"] and "attention on" in case["ours"]["backend"] and not case["notes"]
        for side in ("fast", "eager", "sdpa", *(["smart"] if case["level"] == "op" else [])):
            found = case["sides"][side]
            if found["outcome"] == "absent":  # without perceiver-pytorch
                continue
            assert found["outcome"] == "timed" and found["agrees"], (case["case"], side, found)
            assert len(found["rounds"]) >= 5 and found["quartiles"][0] <= found["median"] <= found["quartiles"][1]
            assert (found["gradient_error"] is None) == (case["pass"] == "forward")
            assert (found["over_ours"] is None) == (side == "fast")
        forward_op = case["level"] == "op" and case["pass"] == "forward"
        assert ("pairs_per_second" in case["sides"]["fast"]) == forward_op
    assert "DRY RUN" in output and "DRY RUN" in (tmp_path / "battery.txt").read_text()
    assert {side["outcome"] for side in result["cases"][0]["sides"].values()} >= {"timed", "not run"}


def test_result_is_strict_json(tmp_path):
    output.save(tmp_path / "new" / "battery.json", {"error": float("nan"), "of": [1.5, (float("inf"), None)]})
    assert json.loads((tmp_path / "new" / "battery.json").read_text()) == {"error": "nan", "of": [1.5, ["inf", None]]}


def test_spent_budget_keeps_what_there_is(tmp_path):
    output = battery("--out", tmp_path, *DRY, "--quick", "--minutes", "0")
    result = json.loads((tmp_path / "battery.json").read_text())
    assert result["outcome"] == "budget spent" and not result["cases"] and len(result["skipped"]) == 6
    assert "6x the time was spent" in output


def test_interrupted_run_keeps_what_there_is(tmp_path):
    path = tmp_path / "battery.json"
    with subprocess.Popen(
        [*COMMAND, "--out", tmp_path, *DRY], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:  # fmt: skip
        try:
            end = time.monotonic() + 100
            while not (path.exists() and json.loads(path.read_text())["cases"]) and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.05)
            assert json.loads(path.read_text())["outcome"] == "running"
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == gpu_battery.INTERRUPTED
        finally:
            process.kill()
    result = json.loads(path.read_text())
    everything, same_op = cases.select()
    assert result["outcome"] == "interrupted" and result["cases"]
    assert {entry["reason"] for entry in result["skipped"]} == {"interrupted", "the same op as imagenet-paper"}
    assert len(everything) + len(same_op) == len(result["cases"]) + len(result["skipped"])


def test_no_device_is_a_clear_error(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "--device cpu makes a dry run" in battery("--out", tmp_path, code=2)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ([], "--out DIR is needed"),
        (["--out", "x", "--case", "op/readme/8"], "expected LEVEL/GEOMETRY/BATCH/DTYPE/PASS"),
        (["--out", "x", "--case", "op/readme/0/bf16/forward"], "expected a batch size"),
        (["--out", "x", "--level", "op", "--geometry", "hf-fourier"], "the same op as imagenet-paper"),
        (["--profile", "op/unknown/8/bf16/forward"], "expected one of imagenet-lucid"),
        (["--profile", "op/readme/1/bf16/forward", "--device", "cpu", "--side", "none"], "expected one of fast"),
    ],
)
def test_wrong_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_battery.main(arguments)
    assert stopped.value.code == 2 and text in capsys.readouterr().err


def test_help_and_list(capsys):
    output = battery("--help")
    options = "out minutes run geometry batch dtype level quick no-tests no-build device profile case compile"
    assert all(f"--{option}" in output for option in options.split())
    assert gpu_battery.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(set(listed)) == len(cases.select()[0])
    assert listed[:6] == [f"op/{name}/8/{dtype}/forward" for dtype in cases.DTYPES for name in cases.HEAD]
    assert [cases.parse_case(name).name for name in listed] == listed


def test_profile_runs_one_side_in_a_loop(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(measure_case, "rotating", lambda problem, side: ran.append)
    assert gpu_battery.main(["--profile", "op/readme/8/fp32/step", "--device", "cpu", "--iterations", "4"]) == 0
    assert ran == [0, 1, 2, 0, 1, 2, 3] and "grid_attention on" in capsys.readouterr().out


def test_geometries_are_the_published_ones():
    channels = {
        "imagenet-lucid": 261,
        "imagenet-paper": 261,
        "readme": 29,
        "video": 390,
        "flow": 322,
        "hf-fourier": 261,
    }
    assert {name: GEOMETRIES[name].token_channels for name in cases.NAMES} == channels
    assert GEOMETRIES["flow"].tokens == 182_528 and GEOMETRIES["video"].tokens == 802_816
    assert all(GEOMETRIES[a].one_layer().arguments == GEOMETRIES[b].one_layer().arguments | {"weight_tie_layers": False}
               for a, b in cases.SAME_OP.items())  # fmt: skip


@pytest.mark.parametrize("package", ["perceiver_pytorch", "flash_attn"])
def test_absent_peers_are_named(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "perceiver_pytorch":
        assert "reference" in check.truth_name()
    result = {"cases": [], "dry_run": True, "conditions": {}, "skipped": []}
    for name in ("op/readme/1/fp32/step", "model/readme/1/fp32/step"):
        case = measured(name)
        assert case["sides"]["fast"]["agrees"] is True
        named = [side for side, peer in sides.PEERS.items() if package in peer.packages and side in case["sides"]]
        assert all(case["sides"][side]["outcome"] == "absent" for side in named)
        assert named or case["level"] == "model"
        result["cases"].append(case)
    text = printed(result)
    assert "absent" in text and package in record.skipped_line(result)


def printed(result):
    console = Console(file=io.StringIO(), width=140)
    for table in record.tables(result):
        console.print(table)
    return console.file.getvalue()


def spoiled(change):
    """A peer that computes our result and then something else."""

    def build(problem):
        side = sides._ours(problem)
        return replace(side, apply=lambda *inputs: change(side.apply(*inputs)))

    return Peer(build)


@pytest.mark.parametrize("pass_name", cases.PASSES)
def test_wrong_results_withhold_the_ratio(pass_name, monkeypatch):
    monkeypatch.setitem(sides.PEERS, "smart", spoiled(lambda out: out * 1.001))
    monkeypatch.setitem(
        sides.PEERS, "flash-attn", spoiled(lambda out: torch.where(out > out.max() - 1, torch.nan, out))
    )
    case = measured(f"op/readme/8/fp32/{pass_name}")
    found = case["sides"]
    assert found["smart"]["agrees"] is False and found["smart"]["outcome"] == "timed"
    assert found["flash-attn"]["agrees"] is False
    assert found["smart"]["over_ours"] is None and found["flash-attn"]["over_ours"] is None
    result = {"cases": [case], "dry_run": False, "conditions": {}, "skipped": []}
    result |= {"outcome": "complete", "tests": {"outcome": "passed"}}
    assert "wrong" in printed(result) and "smart" in record.summary(case) and record.complaints(result) == []
    monkeypatch.setitem(sides.PEERS, "fast", spoiled(lambda out: out + 0.1))
    case = measured(f"op/readme/8/fp32/{pass_name}")
    assert not any(side.get("over_ours") for side in case["sides"].values())
    assert "fast is wrong" in record.complaints(result | {"cases": [case]})[0]


def test_wrong_gradients_are_noticed():
    """Also of a batch's last element alone, in the smallest gradient alone."""
    problem = Problem(cases.parse_case("op/readme/8/fp32/step"), CPU, dry=True)
    truths = check.truth(problem)
    results = list(check.checked_results(problem, sides._ours(problem)))
    assert check.judge(tuple(results), truths, "fp32")["agrees"]
    for index, where in ((0, -1), (1, -1), (len(results) - 1, ...)):
        wrong = [t.clone() for t in results]
        wrong[index][where] *= 1.01
        assert not check.judge(tuple(wrong), truths, "fp32")["agrees"]
    assert check.judge(tuple(results), None, "fp32")["agrees"] is None


def test_side_that_raises_is_one_cell(monkeypatch):
    def fails(problem):
        raise torch.OutOfMemoryError("tried to allocate a lot")

    monkeypatch.setitem(sides.PEERS, "smart", Peer(fails))
    case = measured("op/readme/8/fp32/forward", exclude={"sdpa": "it took the process down"})
    assert case["sides"]["smart"]["outcome"] == "out of memory"
    assert case["sides"]["sdpa"] == {"outcome": "failed", "reason": "it took the process down", "over_ours": None}
    assert case["sides"]["fast"]["outcome"] == "timed"


def test_call_that_fails_while_timed_is_left_out():
    calls, failed = [], []

    def bad(i):
        calls.append(i)
        if len(calls) > 2:
            raise RuntimeError("now")

    both = {"bad": bad, "good": lambda i: None}
    times = clock.interleave(both, dict.fromkeys(both, 1.0), CPU, lambda name, error: failed.append(name))
    assert list(times) == ["good"] and failed == ["bad"] and len(times["good"]["rounds"]) == clock.LONG_ROUNDS


def test_device_events_are_read_as_seconds_a_call(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        record = synchronize = lambda self: None
        elapsed_time = lambda self, other: 8e6  # ms, of four calls

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    ran = []
    done, enqueued = clock._group(ran.append, 3, 4, torch.device("cuda"))
    assert done == 2e3 and enqueued < 1 and ran == [3, 4, 5, 6]


def test_hopeless_cases_are_predicted():
    problem = Problem(cases.parse_case("op/readme/8/fp32/forward"), CPU, dry=True)
    assert sides.reasons(problem, "smart", "none", 10**9) == {} == sides.reasons(problem, "fast", "none", 10)
    assert sides.reasons(problem, "smart", "none", 10)["outcome"] == "out of memory"


def test_lost_process_costs_one_side_and_a_hang_one_case():
    said = []
    worker = Worker({"device": "cpu"}, said.append, gpu_battery_stub.serve)
    try:
        assert worker.start() == {"device": "cpu"}
        first = worker.run(cases.parse_case("op/imagenet-lucid/1/fp32/forward"), time.monotonic() + 60)
        crashed = worker.run(cases.parse_case("op/readme/1/fp32/forward"), time.monotonic() + 60)
        assert crashed["excluded"] == {"fast": "the measuring process ended with code 7"}
        assert crashed["process"] != first["process"]
        lost = worker.run(cases.parse_case("op/flow/1/fp32/forward"), time.monotonic() + 60)
        assert lost["excluded"] == {"fast": "the device was lost: by the stub"}
        hung = worker.run(cases.parse_case("op/video/1/fp32/forward"), time.monotonic() + 2)
        assert "stopped after" in hung["notes"][0] and "busy with fast" in hung["notes"][0] and not hung["sides"]
        assert worker.run(cases.parse_case("op/imagenet-lucid/1/fp32/forward"), time.monotonic() + 60)["excluded"] == {}
    finally:
        worker.stop()
    assert len(said) == 3


def test_commands_are_logged_and_stopped(tmp_path, capfd):
    code, _ = prepare.run_logged([sys.executable, "-c", "print('said'); raise SystemExit(3)"], tmp_path / "log", 60)
    assert code == 3 and (tmp_path / "log").read_text() == "said\n" and "said" in capfd.readouterr().out
    code, _ = prepare.run_logged([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 0.5)
    assert code is None


def test_gpu_tests_are_found():
    """All files that have tests for GPUs alone, and none that has not."""
    files = prepare.gpu_tests()
    assert files[0] == "tests/kernels" and all((ROOT / file).exists() for file in files)
    assert {"tests/ops/test_fourier_projection_cuda.py", "tests/test_graph.py"} <= set(files)
    assert not any(file.endswith(("ops/test_cross_attention.py", "test_gpu_battery.py")) for file in files)


def test_what_tests_printed_is_read_to_wherever_it_ends(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "[gw3] [  2%] PASSED tests/kernels/test_a.py::test_x[(1, 2)-True] \n"
        "[gw0] [100%] FAILED tests/kernels/test_a.py::test_y \n"
        "tests/test_b.py::test_z SKIPPED (there is no GPU)            [ 50%]\n"
        "ERROR tests/test_c.py - ImportError: no\nFAILED tests/kernels/test_a.py::test_y - assert 1 == 2\n[gw1] [ 10"
    )
    failed = ["tests/kernels/test_a.py::test_y", "tests/test_c.py"]
    assert prepare.read_log(log) == {"tests": 4, "failures": 1, "errors": 1, "skipped": 1, "failed": failed}
    assert prepare.read_log(tmp_path / "none")["tests"] == 0
    result = {"outcome": "failed: no start", "cases": [], "tests": {"outcome": "failed", "failed": ["a.b"]}}
    assert record.complaints(result) == ["failed: no start", "tests: failed: a.b"]


def test_sides_whose_turn_comes_too_late_are_not_run():
    found = measured("op/readme/8/fp32/forward", seconds=1e-6)["sides"]
    assert found["fast"]["outcome"] == "timed"
    assert "were spent" in found["smart"]["reason"] and found["smart"]["outcome"] == "not run"


def test_a_field_that_the_driver_refuses_loses_no_other(tmp_path, monkeypatch):
    from benchmarks.gpu.machine import CLOCKS, clocks

    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'case "$1" in *throttle*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'echo "$1" | sed "s/--query-gpu=//; s/,/, /g"\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = clocks()
    assert list(found) == list(CLOCKS) and found["name"] == "name" and found["clocks.sm"] == "clocks.sm"
    assert found["clocks_throttle_reasons.active"].startswith("unknown: nvidia-smi: Field")
    smi.write_text("#!/bin/sh\necho 'no devices'; exit 6\n")
    assert clocks() == {"unknown": "nvidia-smi: no devices"}
