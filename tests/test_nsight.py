"""What ncu found out, in one line a kernel; and the scripts around NVIDIA's profilers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perceiver_fast import __main__ as command_line

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

from benchmarks.nsight import summarize  # noqa: E402

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="the scripts need bash")

XU, FMA, DRAM = (
    f"{name}.avg.pct_of_peak_sustained_elapsed"
    for name in ("sm__inst_executed_pipe_xu", "sm__pipe_fma_cycles_active", "gpu__dram_throughput")
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {  # as ncu prints them: identity first, then metrics with their units
    "ID": "", "Process ID": "", "Process Name": "", "Host Name": "", "Kernel Name": "",
    "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg": "", "Context": "", "Stream": "",
    "Block Size": "", "Grid Size": "", "Device": "", "CC": "", XU: "%", FMA: "%", DRAM: "%",
    "dram__bytes_read.sum": "byte", "dram__bytes_write.sum": "byte", "gpu__time_duration.sum": "ns",
    "launch__registers_per_thread": "register/thread", "smsp__inst_executed_op_local_ld.sum": "inst",
    "smsp__sass_inst_executed_op_local_ld.sum": "inst", "smsp__inst_executed_op_local_st.sum": "inst",
    STALL.format("long_scoreboard"): "inst", STALL.format("not_selected"): "inst", STALL.format("wait"): "inst",
}  # fmt: skip


def launch(number, kernel, *metrics):
    """One row of ncu's table."""
    ranges, sizes = '7  "<default domain>:profiled:none:none:none:none:none:none"', ("(128, 1, 1)", "(512, 8, 1)")
    process = (number, "4711", "python3.11", "127.0.0.1")
    return [str(value) for value in (*process, kernel, ranges, "1", "7", *sizes, "0", "9.0", *metrics)]


ATTENTION = ("81.25", "40.00", "3.10", "1,048,576", "2,048", "{}", "168", "0", "n/a", "0", "0.40", "2.50", "1.20")
NORM = ("2.00", "5.00", "31.00", "8,388,608", "4,194,304", "4,000", "40", "n/a", "12", "3", "7.50", "0.10", "1.00")


def table(units=COLUMNS, before="==PROF== Connected to process 4711 (/usr/bin/python3.11)\nours: grid\n"):
    """What ``ncu --csv --page raw`` prints for two launches of one kernel and one of another."""
    rows = [
        launch(0, "grid_attention_forward_kernel", *(cell.format("120,000") for cell in ATTENTION)),
        launch(1, "layer_norm_forward_kernel", *NORM),
        launch(2, "grid_attention_forward_kernel", *(cell.format("100,000") for cell in ATTENTION)),
    ]
    lines = [list(units), list(units.values()), *rows]
    return before + "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in lines)


def summary(text):
    return summarize.summarize(*summarize.read(text.splitlines(keepends=True)))


def test_a_table_of_ncu_becomes_a_line_a_kernel(tmp_path, capsys):
    path = tmp_path / "ncu.csv"
    path.write_text(table())
    assert summarize.main([str(path), "--json"]) == 0
    attention, norm = json.loads(capsys.readouterr().out)  # the longest first
    assert attention["kernel"] == "grid_attention_forward_kernel" and attention["launches"] == 2
    assert attention["time"] == 110_000 and attention["total"] == 220_000 and attention["exp"] == 81.25
    assert attention["bound_by"] == "exp" and attention["registers"] == 168 and attention["dram_read"] == 2**20
    assert attention["tensor"] is None  # ncu was not asked for it
    assert norm["bound_by"] == "latency (long_scoreboard)" and (norm["local_loads"], norm["local_stores"]) == (12, 3)
    assert summarize.main([str(path)]) == 0
    shown = capsys.readouterr().out
    assert "grid_attention_forward_kernel" in shown and "n/a" in shown and "110.0" in shown


def test_units_are_looked_at():
    scaled = summary(table(COLUMNS | {"gpu__time_duration.sum": "usecond", "dram__bytes_read.sum": "Kbyte"}))
    assert scaled[0]["time"] == 110_000_000 and scaled[0]["dram_read"] == 2**20 * 1000
    with pytest.raises(summarize.Unreadable, match="gpu__time_duration.sum: expected a unit among ns.*got 'cycle'"):
        summary(table(COLUMNS | {"gpu__time_duration.sum": "cycle"}))


@pytest.mark.parametrize(
    "text, message",
    [
        ("==ERROR== ERR_NVGPUCTRPERM\n", 'expected a table that begins with "ID", got none'),
        ('"ID","Kernel Name"\n"0","geglu_forward_kernel"\n', "expected units in the first row"),
        ('"ID","Kernel Name"\n', "expected units in the first row"),
    ],
)
def test_what_is_no_table_of_ncu(text, message, tmp_path, capsys):
    path = tmp_path / "ncu.csv"
    path.write_text(text)
    assert summarize.main([str(path)]) == 2 and message in capsys.readouterr().err
    assert summarize.main([str(tmp_path / "none.csv")]) == 2 and "none.csv" in capsys.readouterr().err


def script(name, *arguments, **environment):
    command = ["bash", str(ROOT / f"benchmarks/nsight/{name}.sh"), *map(str, arguments)]
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_bash
@pytest.mark.parametrize("name", ["nsys", "ncu", "cpu"])
def test_scripts_explain_themselves(name):
    done = script(name, "--help")
    assert done.returncode == 0 and f"benchmarks/nsight/{name}.sh [OPTIONS]" in done.stdout
    assert "#" not in done.stdout and "Exit code" in done.stdout


@needs_bash
@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_scripts_print_the_command_s_lines(name, capsys):
    done = script(name, "--dry-run", "--tiny")
    assert done.returncode == 0, done.stderr
    for pass_name in ("forward", "step"):
        out = ["--out", "out/ncu"] if name == "ncu" else []
        arguments = ["--tiny", "--tool", name, "--pass", pass_name, "--dry-run", *out]
        assert command_line.main(["profile", *arguments]) == 0
    assert done.stdout == capsys.readouterr().out


@needs_bash
def test_the_ncu_script_summarizes_what_ncu_found(tmp_path):
    """A python that has a GPU and an ncu: it leaves a table, as the command would."""
    (tmp_path / "ncu.csv").write_text(table())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *"perceiver_fast profile"*) ;; *) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    done = script("ncu", OUT=str(tmp_path), PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert "grid_attention" in done.stdout and json.loads((tmp_path / "ncu.json").read_text())[0]["bound_by"] == "exp"
