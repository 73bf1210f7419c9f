"""The profile command: ranges' times, other tools' command lines, and what ncu's tables become."""

import json
import os
import re
import shlex
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import needs_extension
from torch.autograd import DeviceType
from warm_python import python

from perceiver_fast import __main__ as command_line
from perceiver_fast.commands import profile_workload
from perceiver_fast.commands.profile import TOOLS, command_lines
from perceiver_fast.commands.profile_torch import range_times
from perceiver_fast.commands.profile_workload import Prepared, Workload
from perceiver_fast.insight.console import CannotRun
from perceiver_fast.insight.ncu import kernel_filter, names
from perceiver_fast.ops.declaration import OPS
from perceiver_fast.ranges import ranges_kind

ROOT = Path(__file__).resolve().parents[1]


def profile(*arguments):
    return command_line.main(["profile", "--tiny", *map(str, arguments)])


@pytest.mark.skipif(**needs_extension)
def test_ranges_of_a_step_add_up_to_the_whole(tmp_path, capsys):
    assert profile("--pass", "step", "--iterations", 2, "--json", "--out", tmp_path) == 0
    result = json.loads(capsys.readouterr().out)
    times = {time["name"]: time for time in result["ranges"]}
    assert {"profiled", "forward", "backward"} == {name for name, time in times.items() if time["kind"] == "pass"}
    assert {"layers.0", "layers.2.cross_attn", "to_logits"} <= {
        n for n, time in times.items() if time["kind"] == "layer"
    }
    assert {"latent_layers", "latent_layers.backward"} <= {n for n, time in times.items() if time["kind"] == "op"}
    assert times["grid_cross_attention"]["calls"] == 3 and times["profiled"]["calls"] == 1
    assert sum(time["self_us"] for time in times.values()) == pytest.approx(times["profiled"]["total_us"])
    assert sum(time["share"] for time in times.values()) == pytest.approx(1)
    assert all(time["self_us"] <= time["total_us"] * (1 + 1e-9) for time in times.values())
    assert times["profiled"]["cuda_total_us"] is None
    assert result["conditions"]["geometry"] == "readme" and result["conditions"]["iterations"] == 2
    trace = json.loads(Path(result["trace"]).read_text())
    assert {"layers.0.cross_attn", "latent_layers.backward"} <= {event.get("name") for event in trace["traceEvents"]}
    assert ranges_kind() == "off"


def test_the_table_names_layers_and_ops(tmp_path, capsys):
    assert profile("--dtype", "bfloat16", "--geometry", "points", "--out", tmp_path, "--iterations", 1) == 0
    shown = capsys.readouterr().out
    assert "model.layers.0.cross_attn" in shown and "fourier_projection" in shown and "self ms" in shown
    assert "points-forward-bfloat16-b1-cpu-tiny.trace.json" in shown.replace("\n", "")


@pytest.mark.parametrize("geometry", ["readme", "points", "io-32"])
def test_the_peer_is_named_too(geometry, tmp_path, capsys):
    arguments = ("--pass", "step", "--peer", "perceiver-pytorch", "--geometry", geometry, "--iterations", 1)
    assert profile(*arguments, "--json", "--out", tmp_path) == 0
    result = json.loads(capsys.readouterr().out)
    times = {time["name"]: time for time in result["ranges"]}
    first = {"readme": "layers.0.cross_attn.fn", "points": "model.layers.0.cross_attn.fn"}
    assert first.get(geometry, "cross_attend_block.cross_attn.fn") in times
    assert sum(time["self_us"] for time in times.values()) == pytest.approx(times["profiled"]["total_us"])


def test_a_peer_that_is_not_installed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "perceiver_pytorch", None)
    assert profile("--peer", "perceiver-pytorch", "--out", tmp_path) == 2
    assert "expected perceiver-pytorch to be installed" in capsys.readouterr().err


def event(name, start, end, parent=None, thread=1, device=0.0):
    elapsed = end - start
    return SimpleNamespace(
        name=name, is_user_annotation=True, device_type=DeviceType.CPU, cpu_parent=parent, thread=thread,
        device_time_total=device, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: elapsed),
    )  # fmt: skip


def test_times_of_nested_ranges_and_of_a_backward_in_its_own_thread():
    whole = event("profiled", 0, 200, device=30)
    backward = event("backward", 100, 190, whole)
    op = event("linear", 10, 60, whole, device=30)
    inner = event("linear", 20, 40, op, device=10)
    other = event("linear.backward", 110, 150, thread=2, device=50)  # on a GPU the engine has a thread of its own
    times = {time.name: time for time in range_times([whole, backward, op, inner, other], 2, cuda=True)}
    assert [times[name].total_us for name in ("profiled", "backward", "linear", "linear.backward")] == [100, 45, 25, 20]
    assert [times[name].self_us for name in ("profiled", "backward", "linear", "linear.backward")] == [30, 25, 25, 20]
    assert (times["linear"].calls, times["linear"].cuda_total_us, times["linear"].cuda_self_us) == (1, 15, 15)
    assert times["linear.backward"].cuda_self_us == 25 and times["backward"].cuda_self_us == 0
    assert sum(time.share for time in times.values()) == pytest.approx(1)


@pytest.mark.parametrize("tool", ["nsys", "ncu", "perf"])
def test_tools_that_are_not_there(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile("--tool", tool, "--out", tmp_path) == 2
    out, err = capsys.readouterr()
    assert f"{tool} " in out and profile_workload.MODULE in out
    assert f"{tool} was not found on PATH: install" in err
    assert ("there is no CUDA GPU" in err) == (tool != "perf")
    assert profile("--tool", tool, "--out", tmp_path, "--json") == 2
    result = json.loads(capsys.readouterr().out)
    assert not result["ran"] and len(result["missing"]) == (1 if tool == "perf" else 2)
    assert result["commands"] == out.splitlines()
    assert profile("--tool", tool, "--out", tmp_path / "new", "--dry-run") == 0
    assert capsys.readouterr().err == "" and not (tmp_path / "new").exists()


def test_a_tool_without_a_gpu_does_not_run(tmp_path, monkeypatch, capsys):
    log = fake_tool(tmp_path, monkeypatch, "nsys")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile("--tool", "nsys", "--out", tmp_path) == 2
    assert not log.exists() and "there is no CUDA GPU" in capsys.readouterr().err


def fake_tool(folder, monkeypatch, name, code=0):
    """An executable of this name on PATH that writes its arguments, a JSON list a line, into the file returned."""
    programs, log = folder / "bin", folder / f"{name}.log"
    programs.mkdir(exist_ok=True)
    program = programs / name
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\nprint('from {name}')\nsys.exit({code})\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return log


def recorded(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("as_json", [False, True])
def test_nsys_runs_what_is_printed(as_json, tmp_path, monkeypatch, capfd):
    log = fake_tool(tmp_path, monkeypatch, "nsys")
    assert profile("--tool", "nsys", "--pass", "step", "--out", tmp_path, *["--json"] * as_json) == 0
    out, err = capfd.readouterr()
    commands = json.loads(out)["commands"] if as_json else out.splitlines()[:2]
    assert [shlex.split(command)[1:] for command in commands] == recorded(log)
    record, stats = recorded(log)
    assert record[0] == "profile" and stats[0] == "stats"
    assert {"--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,osrt"} <= set(record)
    output = next(argument for argument in record if argument.startswith("--output=")).removeprefix("--output=")
    assert stats[-1] == f"{output}.nsys-rep"
    assert "from nsys" in (err if as_json else out)
    if as_json:
        assert json.loads(out) | {"commands": 0} == {
            "tool": "nsys", "commands": 0, "missing": [], "ran": True, "files": [f"{output}.nsys-rep"]
        }  # fmt: skip


def test_ncu_runs_what_is_printed_and_keeps_the_table(tmp_path, monkeypatch, capfd):
    log = fake_tool(tmp_path, monkeypatch, "ncu")
    assert profile("--tool", "ncu", "--kernel", "geglu", "--out", tmp_path) == 0
    out = capfd.readouterr().out
    record, export = recorded(log)
    assert shlex.split(out.splitlines()[0])[1:] == record and out.count("from ncu") == 1
    assert record[record.index("--kernel-name") + 1] == f"regex:{OPS['geglu'].kernels}"
    assert record[record.index("--profile-from-start") + 1] == "off"
    assert record[record.index("--metrics") + 1] == names() and "SpeedOfLight" in record
    assert export[:2] == ["--import", record[record.index("--export") + 1]] and "raw" in export
    table = next(tmp_path.glob("*.ncu.csv"))
    assert table.read_text() == "from ncu\n" and out.splitlines()[1].endswith(f"> {table}")


def test_ncu_filters_ours_unless_it_looks_at_the_peer():
    def record(**workload):
        return shlex.split(command_lines(TOOLS["ncu"], Workload(**workload), Path("a folder"))[0])

    assert f"regex:{kernel_filter(None)}" in record()
    theirs = record(peer="perceiver-pytorch")
    assert (
        "--kernel-name" not in theirs and "a folder/readme-forward-float32-b1-cpu-perceiver-pytorch.ncu-rep" in theirs
    )
    assert kernel_filter("sgemm.*") == "sgemm.*"


def test_perf_runs_what_is_printed(tmp_path, monkeypatch, capfd):
    log = fake_tool(tmp_path, monkeypatch, "perf")
    assert profile("--tool", "perf", "--out", tmp_path) == 0
    commands = [shlex.split(line) for line in capfd.readouterr().out.splitlines()[:5]]
    assert [command[1:] for command in commands if command[0] == "perf"] == recorded(log)
    record = recorded(log)[0]
    assert record[0] == "record" and "--delay=-1" in record
    assert f"--control=fifo:{record[-1]}" in record and record[-2] == "--perf-control"
    assert "ONEDNN_JIT_PROFILE=2" in record
    assert not list(tmp_path.glob("*.ctl"))  # the fifos are gone


def test_a_tool_that_fails(tmp_path, monkeypatch, capfd):
    log = fake_tool(tmp_path, monkeypatch, "nsys", code=3)
    assert profile("--tool", "nsys", "--out", tmp_path) == 2
    assert "exit code 3 of nsys profile" in capfd.readouterr().err and len(recorded(log)) == 1
    assert profile("--tool", "nsys", "--out", tmp_path, "--json") == 2
    assert not json.loads(capfd.readouterr().out)["ran"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--kernel", "geglu"], "--kernel is ncu's"),
        (["--dry-run"], "expected --tool nsys, ncu or perf"),
        (["--tool", "nsys", "--device", "cpu"], "nsys looks at cuda: expected no other --device, got cpu"),
        (["--tool", "perf", "--device", "cuda"], "perf looks at cpu"),
        (["--device", "cuda"], "expected a CUDA GPU for --device cuda, got none"),
    ],
    ids=str,
)
def test_what_cannot_be(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert profile(*arguments, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert profile("--out", tmp_path / "file") == 2
    assert "profile: " in capsys.readouterr().err


def test_bad_numbers(capsys):
    with pytest.raises(SystemExit) as done:
        profile("--iterations", 0)
    assert done.value.code == 2 and "expected at least 1, got 0" in capsys.readouterr().err


def test_a_workload_is_its_command_line(monkeypatch):
    workload = Workload("video", "step", "float16", 4, 2, "cpu", "perceiver-pytorch", 7, True)
    seen = []
    monkeypatch.setattr(profile_workload, "Prepared", lambda workload: seen.append(workload) or stop())
    command = workload.command()
    assert command[:3] == [sys.executable, "-m", profile_workload.MODULE]
    assert profile_workload.main(command[3:]) == 2 and seen == [workload]


def stop():
    raise CannotRun("seen enough")


def test_the_region_is_marked_after_the_warm_up(monkeypatch, tmp_path, capsys):
    """A thread plays perf: commands come through one fifo, and are acknowledged through another."""
    control, acknowledged = tmp_path / "ctl", tmp_path / "ack"
    os.mkfifo(control)
    os.mkfifo(acknowledged)
    log = []

    def perf():
        for _ in range(2):
            log.append(control.read_text().strip())
            acknowledged.write_text("ack\n")

    monkeypatch.setattr(Prepared, "warm_up", lambda self: log.append("warm-up"))
    monkeypatch.setattr(Prepared, "iterate", lambda self: log.append(self.workload.iterations))
    thread = threading.Thread(target=perf, daemon=True)
    thread.start()
    arguments = ["--tiny", "--device", "cpu", "--iterations", "5", "--perf-control", f"{control},{acknowledged}"]
    assert profile_workload.main(arguments) == 0
    thread.join(60)
    assert log == ["warm-up", "enable", 5, "disable"]
    assert "readme-forward-float32-b1-cpu-tiny: 5 iterations" in capsys.readouterr().err


def test_cuda_profilers_are_told_where_the_region_is(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    with profile_workload._region(True, None):
        log.append("inside")
    with profile_workload._region(False, None):
        pass
    assert log == ["start", "inside", "stop"]


def test_the_process_that_tools_look_at_runs():
    command = Workload(tiny=True, iterations=1, pass_name="step").command()
    done = python(*command[1:], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "readme-step-float32-b1-cpu-tiny: 1 iterations" in done.stderr


def test_every_kernel_belongs_to_an_op():
    triton = [
        name for path in (ROOT / "kernels").glob("*.py") for name in re.findall(r"def (\w+_kernel)\(", path.read_text())
    ]
    cuda = [
        name
        for path in (ROOT / "csrc/cuda").glob("*.cu*")
        for name in re.findall(r"__global__.*?\s(\w+_kernel)\(", path.read_text(), re.DOTALL)
    ]
    assert len(triton) > 15 and len(cuda) >= 5
    for kernel in triton + cuda:
        assert any(re.fullmatch(op.kernels, kernel) for op in OPS.values()), kernel
        assert re.search(kernel_filter(None), kernel)
