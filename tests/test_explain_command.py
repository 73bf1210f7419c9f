"""The explain command: tables, JSON, and what it says when it cannot."""

import json

import pytest
import torch
from support import needs_extension

import perceiver_fast as pf
from perceiver_fast.__main__ import main
from perceiver_fast.commands import explain as command
from perceiver_fast.commands.explain_table import NAME_WIDTH, at_dots, duration
from perceiver_fast.insight import roofs
from perceiver_fast.insight.geometries import GEOMETRIES
from perceiver_fast.insight.roofs import Roofs

STAND_IN = Roofs(multiply_adds=1e10, exponentials=1e9, copied_bytes=2e9, threads=1)


@pytest.fixture
def stand_in(monkeypatch):
    """Roofs without a second of measuring."""
    monkeypatch.setattr(roofs, "measure_roofs", lambda threads: STAND_IN)


@pytest.mark.skipif(**needs_extension)
def test_the_command_prints_a_table(stand_in, capsys):
    assert main(["explain", "--geometry", "readme", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "perceiver-pytorch's README" in shown and "224 x 224 tokens of 29 channels; batch 1" in shown
    assert "layers.{0..5}.cross_attn" in shown and "12 x" in shown and "perceiver-pytorch" in shown
    for header in ("layer", "runs on", "time", "share", "saving"):
        assert header in shown
    (row,) = [line for line in shown.splitlines() if "cross_attn" in line]
    assert row.split()[1:6] == ["6", "x", "grid_attention", "on", "cpu"] and row.split()[-1] == "14x"
    assert "predicted" in shown and "1 thread of this CPU" in shown and " ms" in shown
    assert "exponentials     bytes" not in shown and "not projected" not in shown
    assert main(["explain", "--geometry", "readme", "--why", "--batch", "2"]) == 0
    shown = capsys.readouterr().out
    assert "not projected: more work" in shown and "batch 2" in shown and "layers.{1..5}.cross_attn" in shown


@pytest.mark.skipif(**needs_extension)
def test_all_columns_on_request(stand_in, capsys):
    assert main(["explain", "--geometry", "readme", "--wide", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "layers.{0..5}.self_attns.{0..1}.0" in shown and "grid: grid_attention on cpu" in shown
    for header in ("exponentials", "bytes", "share", "perceiver-pytorch:", "multiply-adds"):
        assert header in shown
    assert max(map(len, shown.splitlines())) > 100


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_table_fits_80_columns(name, stand_in, capsys):
    assert main(["explain", "--geometry", name, "--batch", "64"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "\u2026" not in shown


def test_long_names_are_broken_before_dots():
    name = "encoder.blocks.{0..11}.layers.{0..5}.cross_attn.fn"
    assert "".join(part.strip() for part in at_dots(name, NAME_WIDTH)) == name
    assert all(len(part) <= NAME_WIDTH for part in at_dots(name, NAME_WIDTH)) and len(at_dots(name, NAME_WIDTH)) == 3
    assert at_dots("x" * 40, NAME_WIDTH) == ["x" * 25, "  " + "x" * 15]


@pytest.mark.parametrize(
    "options, why",
    [
        (["--device", "cuda"], "no roofs are known for cuda"),
        (["--dtype", "float64"], "the roofs are those of float32, not float64"),
    ],
)
def test_without_roofs_shares_are_of_the_cost(options, why, capsys):
    assert main(["explain", "--geometry", "io-32", *options]) == 0
    shown = capsys.readouterr().out
    assert "Share: of the counted cost." in shown and f"No times: {why}." in shown and " ms" not in shown
    assert main(["explain", "--geometry", "io-32", "--json", *options]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert stored["roofs"] is None and stored["no_roofs"] == why and stored["share_of"] == "counted cost"


def test_without_the_extension_there_are_no_times(monkeypatch, capsys):
    monkeypatch.setattr(pf.extension, "error", "the C++ extension was not built")
    model = pf.Perceiver(num_freq_bands=2, depth=1, max_freq=4.0, num_latents=4, latent_dim=8)
    found = pf.explain(model, torch.empty(1, 5, 6, 3))
    assert command.measured_roofs(found, 1)[0] is None and "not built" in command.measured_roofs(found, 1)[1]


@pytest.mark.skipif(**needs_extension)
def test_the_command_prints_json(stand_in, capsys):
    assert main(["explain", "--geometry", "cross-only", "--json"]) == 0
    stored = json.loads(capsys.readouterr().out)
    assert (stored["geometry"], stored["batch"], stored["roofs"]["threads"]) == ("cross-only", 1, 1)
    assert stored["total"]["perceiver_pytorch"]["multiply_adds"] > 10 * stored["total"]["counts"]["multiply_adds"]


def test_the_command_lists_geometries(capsys):
    assert main(["explain", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in GEOMETRIES) and "6 of 26 latent layers" in shown
    assert main(["explain", "--list", "--json"]) == 0
    assert [geometry["geometry"] for geometry in json.loads(capsys.readouterr().out)] == list(GEOMETRIES)


def test_the_command_says_what_it_cannot_do(capsys):
    assert main(["explain"]) == 2
    assert "expected one of MODULE:CALLABLE, --arguments or --geometry NAME, got none" in capsys.readouterr().err
    for wrong in (["--geometry", "no-such"], ["--batch", "0"], ["--batch", "many"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit) as done:
            main(["explain", *wrong])
        assert done.value.code == 2
    with pf.use_backend("triton"):
        assert main(["explain", "--geometry", "io-32"]) == 2
    assert "'triton' was forced but cannot run" in capsys.readouterr().err


def test_durations_for_people():
    shown = [duration(seconds) for seconds in (12345.6, 12.3456, 0.99, 1e-3, 2.5e-5, 0.0)]
    assert shown == ["12,346 s", "12.3 s", "990 ms", "1 ms", "25 us", "0 us"]
