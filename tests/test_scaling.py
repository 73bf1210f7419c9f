"""Scaling curves on grids of a few tokens: points, limits, stops, the file, the pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

pytest.importorskip("matplotlib")
pytest.importorskip("perceiver_pytorch")
pytest.importorskip("psutil")

from support import needs_extension

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import plot, point, record
from benchmarks.scaling.point import Limits, Stopped, case_of
from benchmarks.scaling.record import Point
from benchmarks.suite.measure import build_call
from benchmarks.suite.memory import METHOD, memory_method
from perceiver_fast import extension

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by way of /proc")
CASE = case_of("eager", 4, 3, "forward", "float32")
LIMITS = Limits(threads=1, bytes=2**30, seconds=60.0)
POINT = Point("tokens", "fast", 100, 8, "forward", "float32", 1, "measured", 0.01, 0.009, 0.011, 0.008, 5, 4096, 1200)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """Grids of 4 x 4 to 8 x 8 tokens, 3 or 6 latents."""
    monkeypatch.setattr(scaling, "SIDES", {"tokens": (4, 8), "latents": (4,)})
    monkeypatch.setattr(scaling, "LATENTS", {"tokens": (3,), "latents": (3, 6)})


@pytest.fixture
def stand_in(monkeypatch, tiny):
    """No processes: eager takes a byte per pair, and so much time, the others ten times less."""

    def measured(case, limits):
        pairs = case.geometry.tokens * case.geometry.queries * (10 if case.peer == "eager" else 1)
        times = dict.fromkeys(("median", "q1", "q3", "min"), 1e-3 * pairs)
        return times | {"rounds": 3, "peak_memory_bytes": pairs, "fingerprint": [[1.0, 2.0], []]}

    monkeypatch.setattr(scaling, "measure", measured)
    monkeypatch.setattr(extension, "error", None)


def run(tmp_path, *options):
    """Exit code and JSON of a run that writes to ``tmp_path``."""
    out = tmp_path / "result.json"
    code = scaling.main(["--out", str(tmp_path), "--json", str(out), "--threads", "1", *options])
    return code, json.loads(out.read_text()) if out.exists() else None


@linux
@pytest.mark.skipif(**needs_extension)
def test_end_to_end(tiny, tmp_path, capsys):
    code, result = run(tmp_path, "--peers", "eager", "fast", "--pass", "step")
    assert code == 0
    points = [Point(**point) for point in result["points"]]
    assert [(point.axis, point.tokens, point.latents, point.peer) for point in points] == [
        (axis, tokens, latents, peer)
        for axis, tokens, latents in (("tokens", 16, 3), ("tokens", 64, 3), ("latents", 16, 3), ("latents", 16, 6))
        for peer in ("eager", "fast")
    ]
    for one in points:
        assert one.status == "measured" and one.rounds >= 3
        assert 0 < one.min <= one.q1 <= one.median <= one.q3
        assert (one.peak_memory_bytes is not None) == (memory_method() == METHOD)
        assert one.input_bytes == 12 * one.tokens
        assert one.difference is None if one.peer == "eager" else 0.0 <= one.difference < 1e-3
    table, png, svg = map(Path, result["files"])
    assert record.read(table)[1] == points and "-step" in table.name
    assert png.read_bytes().startswith(b"\x89PNG") and ElementTree.parse(svg).getroot().tag.endswith("svg")
    captured = capsys.readouterr()
    assert "ours grows with latents to the power of: time" in captured.out
    assert "latents: M = 16, N = 6: fast" in captured.err


@linux
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pass_name", ["forward", "step"])
def test_peers_agree(pass_name, dtype):
    case = replace(CASE, pass_name=pass_name, dtype=dtype)
    prints = [point.fingerprint(build_call(replace(case, peer=peer))()) for peer in ("eager", "sdpa", "fast")]
    assert (len(prints[0][1]) > 0) == (pass_name == "step")
    for found in prints[1:]:
        assert point.difference(found, prints[0]) < scaling.SAME[dtype]


def test_a_difference_is_seen_in_either_part():
    truth = [[3.0, 4.0], [1.0]]
    assert point.difference(truth, truth) == 0.0
    assert point.difference([[3.0, 4.0], [1.5]], truth) == pytest.approx(0.5)
    assert point.difference([[3.0, 9.0], [1.0]], truth) == pytest.approx(1.0)
    bad = point.difference([[3.0, float("nan")], [1.0]], truth)
    assert scaling.is_different(replace(POINT, difference=bad)) and not scaling.is_different(POINT)


@linux
def test_a_process_that_wants_too_much_is_out_of_memory():
    """512 latents and 256 x 256 tokens are 128 MiB of logits; the machine has them, the task does not allow them."""
    with pytest.raises(Stopped, match="allocate") as stopped:
        point.measure(case_of("eager", 256, 512, "forward", "float32"), replace(LIMITS, bytes=64 * 2**20))
    assert stopped.value.status == "out of memory"


@linux
def test_a_call_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(point, "START_SECONDS", 0.0)
    with pytest.raises(Stopped, match="0.002 s, 0.001 s are allowed") as stopped:
        point.measure(CASE, replace(LIMITS, seconds=1e-3))
    assert stopped.value.status == "too slow"


@linux
def test_what_a_peer_raises_is_where_it_stops():
    with pytest.raises(Stopped, match="Trying to create tensor with negative dimension") as stopped:
        point.measure(case_of("eager", 4, -1, "forward", "float32"), LIMITS)
    assert stopped.value.status == "failed"


def test_a_peer_stops_before_it_needs_more_than_is_allowed(stand_in, tmp_path, capsys):
    """eager needs 480 bytes at M = 16, four times as many at M = 64."""
    code, result = run(tmp_path, "--peers", "eager", "fast", "--axis", "tokens", "--limit-memory", "400")
    assert code == 0
    *_, stop, ours = result["points"]
    assert (stop["status"], stop["needed_bytes"], stop["median"]) == ("would not fit", 1920, None)
    assert stop["tokens"] == 64 and "not run" in stop["detail"] and ours["status"] == "measured"
    assert "would not fit\nat M = 64 (would need" in (text := plot._stop_text(Point(**stop)))
    assert (
        text.endswith("GiB)") and "eager at M = 64, N = 3: would not fit: would need about" in capsys.readouterr().out
    )
    assert result["exponents"] == {"tokens": {"time": 1.0, "memory": 1.0}}


def test_a_peer_stops_after_a_call_that_was_too_long(stand_in, tmp_path):
    code, result = run(tmp_path, "--peers", "eager", "fast", "--axis", "latents", "--limit-seconds", "0.3")
    assert code == 0
    assert [(point["peer"], point["status"]) for point in result["points"]] == [
        ("eager", "too slow"), ("fast", "measured"), ("fast", "measured")
    ]  # fmt: skip
    assert result["points"][0]["median"] == pytest.approx(0.48)


def test_a_peer_that_fails_or_differs_is_not_fine(stand_in, monkeypatch, tmp_path, capsys):
    measured = scaling.measure

    def other(case, limits):
        if case.peer == "sdpa":
            raise Stopped("failed", "no such thing")
        return measured(case, limits) | ({"fingerprint": [[1.0, 2.1], []]} if case.peer == "fast" else {})

    monkeypatch.setattr(scaling, "measure", other)
    assert run(tmp_path, "--peers", "eager", "sdpa", "--axis", "tokens")[0] == 1
    assert "sdpa at M = 16, N = 3: failed: no such thing" in capsys.readouterr().out
    assert run(tmp_path, "--peers", "eager", "fast", "--axis", "tokens")[0] == 1
    assert "other results than the first peer's: fast at M = 16" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_measured(stand_in, monkeypatch, tmp_path, capsys):
    measured = scaling.measure

    def interrupted(case, limits):
        if case.geometry.tokens == 64 and case.peer == "fast":
            raise KeyboardInterrupt
        return measured(case, limits)

    monkeypatch.setattr(scaling, "measure", interrupted)
    code, result = run(tmp_path, "--peers", "eager", "fast")
    assert code == 2 and "interrupted; 3 points are in" in capsys.readouterr().err
    _, points = record.read(Path(result["files"][0]))
    assert len(points) == 3 and all(Path(path).exists() for path in result["files"])
    assert not list(tmp_path.glob("*.part"))


def test_points_survive_the_file(tmp_path):
    stop = replace(POINT, peer="eager", status="out of memory", median=None, q1=None, rounds=None, needed_bytes=7,
                   detail='needs about 9 GiB, "2 GiB" are allowed')  # fmt: skip
    path = tmp_path / "points.csv"
    record.write(path, {"cpu": "a: b\n c", "threads": 2}, [POINT, stop])
    assert record.read(path) == ({"cpu": "a: b c", "threads": "2"}, [POINT, stop])


def test_redraw_measures_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "measure", None)
    path = tmp_path / "old.csv"
    record.write(path, {"cpu": "Xeon"}, [POINT, replace(POINT, tokens=1000, median=0.1)])
    before = path.read_text()
    assert scaling.main(["--redraw", str(path), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exponents"]["tokens"]["time"] == 1.0 and path.read_text() == before
    first = (tmp_path / "old.svg").read_bytes()
    assert scaling.main(["--redraw", str(path), "--json", "-"]) == 0
    assert (tmp_path / "old.svg").read_bytes() == first and (tmp_path / "old.png").stat().st_size > 10_000


def test_pictures_hold_curves_that_lack_something(tmp_path):
    """No memory at all, and a peer that never ran."""
    points = [replace(POINT, peak_memory_bytes=None), replace(POINT, peer="eager", status="failed", median=None)]
    for path in plot.draw({}, points, tmp_path / "name.with.dots"):
        assert path.stat().st_size > 5_000 and path.name.startswith("name.with.dots.")


def test_names_do_not_cover_each_other():
    lines, wished = [1, 2, 1, 2], [0.5, 0.5, 0.99, 1.2]
    places = plot.spread(lines, wished)
    heights = [plot.LINE * count for count in lines]
    assert places[0] == pytest.approx(0.5) and places[-1] + heights[-1] / 2 <= 1.0
    for i in range(3):
        assert places[i + 1] - places[i] >= (heights[i] + heights[i + 1]) / 2 - 1e-9


def test_exponents_are_of_the_last_two_decades():
    line = [(10**k, 5.0 if k < 5 else 5.0 * 10 ** (k - 5)) for k in range(8)]
    assert record.exponent(line) == 1.0 and record.exponent(line[:5]) == 0.0
    assert record.exponent(line[:1]) is None and record.exponent([]) is None


@pytest.mark.parametrize("axis", ["tokens", "latents"])
def test_real_sizes_are_those_of_the_axes(axis):
    sizes = scaling.sizes(axis, quick=False)
    tokens, latents = [side**2 for side, _ in sizes], [count for _, count in sizes]
    if axis == "tokens":
        assert tokens == pytest.approx([10 ** (k / 2) for k in range(6, 15)], rel=0.03) and set(latents) == {512}
    else:
        assert latents == [2**k for k in range(5, 14)] and set(tokens) == {50_176}
    assert scaling.sizes(axis, quick=True) == sizes[: scaling.QUICK]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--redraw", "no-such.csv"], "No such file"),
        (["--redraw", str(ROOT / "README.md")], "expected the columns axis, peer"),
        (["--limit-seconds", "0"], "--limit-seconds: expected more than 0, got 0"),
    ],
)
def test_what_cannot_run_says_why(options, expected, capsys):
    assert scaling.main(options) == 2
    assert expected in capsys.readouterr().err


def test_without_the_extension_ours_is_not_measured(monkeypatch, capsys):
    monkeypatch.setattr(extension, "error", "not built")
    assert scaling.main([]) == 2
    assert "not built; or leave fast out of --peers" in capsys.readouterr().err
