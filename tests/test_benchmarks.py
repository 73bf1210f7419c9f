"""The benchmarks' own parts: geometries, peers, checks, tables and the command line. Nothing is timed here."""

import doctest
import functools
import io
import json
import operator
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

pytest.importorskip("perceiver_pytorch")

from rich.console import Console  # noqa: E402
from warm_python import python

from benchmarks import environment, output, statistic  # noqa: E402
from benchmarks.scaling import plot, record  # noqa: E402
from benchmarks.sides import Case, Level, Peer, Side, errors, excess, parameters  # noqa: E402
from benchmarks.suite import measure, report, test_levels  # noqa: E402
from benchmarks.suite.levels import LEVELS  # noqa: E402
from benchmarks.suite.memory import Memory, memory_method, peak_memory  # noqa: E402
from benchmarks.suite.models import PEERS, SDPAAttention, eager, sdpa  # noqa: E402
from benchmarks.suite.plans import PLANS, eager_bytes, select  # noqa: E402
from benchmarks.suite.throughput import Work, step_of, throughput, work_of  # noqa: E402
from perceiver_fast.insight import roofs  # noqa: E402
from perceiver_fast.insight.geometries import GEOMETRIES  # noqa: E402


def having(level):
    """The geometries that are measured at a level."""
    return [name for name, plan in PLANS.items() if level in plan.levels]


AGREEING = [
    (level, name, peer)
    for level, parts in LEVELS.items()
    for name in having(level)
    for peer, how in parts.peers.items()
    if not how.compiled and peer != "flash-perceiver" and how.fits(Case(level, GEOMETRIES[name], "forward", peer))
]


@pytest.mark.parametrize("level, name, peer", AGREEING)
def test_peers_agree_on_every_geometry(level, name, peer):
    """Gradients too, by perceiver-pytorch's names, whatever a peer calls them; in every dtype that is measured."""
    for pass_name in LEVELS[level].passes:
        for dtype in LEVELS[level].dtypes:
            case = Case(level, GEOMETRIES[name].tiny(), pass_name, peer, 2, dtype)
            how = LEVELS[level].peers[peer]
            if reasons := how.absent() + how.reasons(case):
                pytest.skip("; ".join(reasons))
            side = how.build(case)
            results = side.common(case.call(side)())
            found = measure.checked(results, case)
            assert (found["gradient_error"] is None) == (pass_name == "forward")
            if level == "model":
                assert list(side.parameters) == list(parameters(eager(case.geometry)))
            if level == "grid_attention":
                assert len(results) == {"forward": 1, "step": 2, "step+tokens": 4}[pass_name]


def test_every_level_is_measured():
    assert {level for plan in PLANS.values() for level in plan.levels} == set(LEVELS)
    assert all(getattr(test_levels, f"test_{level}").__name__ == f"test_{level}" for level in LEVELS)
    assert all(LEVELS[level].peers["fast"].reasons(None) == PEERS["fast"].reasons(None) for level in LEVELS)


def test_sdpa_peer_keeps_masks_and_state():
    geometry = GEOMETRIES["readme"].tiny()
    model, changed = eager(geometry), sdpa(geometry)
    assert {type(m) for m in changed.modules() if "Attention" in type(m).__name__} == {SDPAAttention}
    changed.load_state_dict(model.state_dict())
    data = geometry.input(3)
    mask = torch.rand(3, *geometry.sizes, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False  # attends uniformly
    results = []
    for module in (changed, model):
        out = module(data, mask=mask)
        grads = torch.autograd.grad(out.square().sum(), tuple(parameters(module).values()))
        results.append((out, *grads))
    assert not excess(errors(*results), (1e-3, 1e-2))


@pytest.mark.parametrize("arguments", [{"queries_contribute_kv": True}, {}])
def test_sdpa_attention_leaves_the_rest_to_the_original(arguments):
    torch.manual_seed(0)
    attention = SDPAAttention(8, 8, heads=2, dim_head=4, **arguments)
    inverted = not arguments
    x, context, mask = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 5) > 0.3
    call = {"context": context, "mask": mask, "inverted_attention": inverted}
    assert torch.equal(attention(x, **call), super(SDPAAttention, attention).forward(x, **call))


def test_wrong_results_are_found():
    one, near, nan = torch.ones(4), torch.full((4,), 1.01), torch.full((4,), float("nan"))
    most = (1e-3, 1e-2)
    assert errors((one, one), (one, one)) == {"relative_error": 0.0, "gradient_error": 0.0}
    assert excess(errors((near,), (one,)), most) == ["the output is off by 1.00e-02, more than 1e-03"]
    assert "the gradients are off" in excess(errors((one, nan), (one, one)), most)[0]
    # python's max() forgets a NaN that is not first
    assert "the gradients are off" in excess(errors((one, one, nan), (one, one, one)), most)[0]
    assert errors((one, near, 3e-9 * one), (one, one, 1e-9 * one))["gradient_error"] == pytest.approx(1e-2)


def test_peak_memory_is_that_of_the_call():
    if memory_method().startswith("not measured"):
        pytest.skip(memory_method())
    peak = peak_memory(functools.partial, operator.mul, b"x", 64 * 2**20)  # bytes of that length
    assert 63 * 2**20 < peak.peak < 66 * 2**20 and peak.kept < 2**20
    with pytest.raises(RuntimeError, match="exit code 3"):
        peak_memory(sys.exit, 3)


class Stopwatch:
    """What pytest-benchmark gives a benchmark, with a time that is known."""

    def __init__(self, seconds):
        self.extra_info, self.stats = {}, SimpleNamespace(stats=SimpleNamespace(median=seconds))

    def pedantic(self, call, rounds, warmup_rounds, iterations):
        self.rounds = rounds
        call()


def test_a_measurement_is_checked_and_kept(monkeypatch):
    def constant(value):
        return lambda case: Side(lambda: torch.full((4,), value))

    work = Work(2, 20, 30, 100, multiply_adds=250, exponentials=5)
    peers = {
        "fast": Peer(constant(1.0)),
        "wrong": Peer(constant(2.0)),
        "absent": Peer(constant(1.0), packages=("no_such",)),
    }
    monkeypatch.setitem(LEVELS, "model", Level(peers, constant(1.0)))
    monkeypatch.setattr(measure, "work_of", lambda case: work)
    monkeypatch.setattr(measure, "peak_memory", lambda build, case: Memory(5, 7))
    monkeypatch.setattr(
        "benchmarks.suite.throughput.measure_roofs", lambda threads: roofs.Roofs(1000, 100, 500, threads)
    )
    measure.truths.cache_clear()
    stopwatch, case = Stopwatch(0.5), Case("model", GEOMETRIES["readme"], "forward", "fast", batch=2)
    measure.measure(stopwatch, case)
    info = stopwatch.extra_info
    assert info["level"] == "model" and info["batch"] == 2 and info["relative_error"] == 0 and stopwatch.rounds >= 5
    assert info["peak_memory_bytes"] == 5 and info["kept_memory_bytes"] == 7
    assert info["tokens"] == 10 and info["tokens_per_second"] == 40 and info["inputs_per_second"] == 4
    assert info["percent_of_exp_roof"] == pytest.approx(60) and info["percent_of_copy_roof"] == pytest.approx(40)
    assert info["percent_of_fma_roof"] == pytest.approx(50) and info["percent_of_roof"] == pytest.approx(60)
    with pytest.raises(AssertionError, match="the output is off"):
        measure.measure(Stopwatch(0.5), replace(case, peer="wrong"))
    with pytest.raises(pytest.skip.Exception, match="no_such cannot be imported"):
        measure.measure(Stopwatch(0.5), replace(case, peer="absent"))
    measure.truths.cache_clear()


def test_without_roofs_there_are_no_shares(monkeypatch):
    monkeypatch.setattr("benchmarks.suite.throughput.measure_roofs", lambda threads: None)
    found = throughput(Work(1, 10, 0, 100, 5, 6), 2.0, 1)
    assert found["tokens_per_second"] == 5 and found["pairs_per_second"] is None and found["percent_of_roof"] is None


def test_a_step_is_counted():
    assert step_of(Work(1, 2, 3, 4, 5.0, 6.0)) == Work(1, 2, 3, 8, 15.0, 12.0)


def test_counts_are_those_of_the_sides():
    geometry = GEOMETRIES["cross-only"].tiny()
    queries, tokens, channels, width = 6, 30, geometry.token_channels, 16
    layer = 64 * (2 * queries * width + 2 * tokens * channels + 2 * queries * tokens)
    work = work_of(Case("layer", geometry, "forward", "eager"))
    assert work.multiply_adds == layer and work.pairs == queries * tokens and work.exponentials >= work.pairs
    whole, fast, compiled = (
        work_of(Case("model", geometry, "forward", peer, 2)) for peer in ("eager", "fast", "compile")
    )
    assert whole.multiply_adds == 2 * (layer + queries * width * 4 * 3 * width + width * 5) == compiled.multiply_adds
    assert fast.multiply_adds < whole.multiply_adds and fast.pairs == whole.pairs and fast.bytes == whole.bytes
    readme = GEOMETRIES["readme"].tiny()
    product = work_of(Case("linear", readme, "step", "fast", 2))
    assert product.tokens == 2 * queries and product.multiply_adds == 3 * 2 * queries * width * 8 * width
    assert product.bytes == 2 * 4 * (2 * queries * width + 8 * width * width + 2 * queries * 8 * width)
    assert work_of(Case("grid_attention", readme, "forward", "fast")).pairs == queries * tokens


def test_memory_of_the_original_grows_with_the_batch():
    assert eager_bytes(GEOMETRIES["readme"], 4) == 4 * eager_bytes(GEOMETRIES["readme"], 1)


def test_selection():
    assert "imagenet-lucid" not in select([], False, ["model"])
    assert select([], True, ["model"]) == having("model") and select(["points"], False, ["grid_attention"]) == []
    assert select(["points"], False, []) == ["points"]
    assert set(PLANS) == set(GEOMETRIES)


def collected(*arguments):
    finished = python("-m", "pytest", "benchmarks", "--collect-only", "-q", *arguments, cwd=ROOT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return [line for line in finished.stdout.splitlines() if "::" in line]


def test_the_suite_collects_what_is_asked_for():
    quick = collected("--quick")
    assert quick and all("[cross-only-batch1-" in line and "compile-eager" not in line for line in quick)
    assert not any("bfloat16" in line for line in quick)
    asked = collected("--geometry=readme", "--level=model", "--dtype=bfloat16", "--pass=step", "--batch=1", "--batch=4")
    assert len(asked) == 2 * len(PEERS) and all("step-bfloat16" in line for line in asked)
    assert any("readme-batch4" in line for line in asked)


def row(peer, seconds, **changes):
    return {
        "level": "model", "geometry": "cross-only", "pass": "step", "peer": peer, "batch": 1, "dtype": "float32",
        "threads": 2, "median": seconds, "min": seconds, "q1": seconds, "q3": seconds, "iqr": 0.0, "rounds": 5,
        **dict.fromkeys(("kept_memory_bytes", "tokens_per_second", "percent_of_roof")), "relative_error": 1e-6, "gradient_error": 2e-5,
        "peak_memory_bytes": 3 * 2**20, "peak_memory_method": "by hand", **changes,
    }  # fmt: skip


def printed(rows, missing):
    console = Console(file=io.StringIO(), width=160)
    for table in report.tables(rows, missing):
        console.print(table)
    return console.file.getvalue()


def test_tables_show_ratios_losses_and_what_is_missing():
    missing = [
        {"level": "model", "geometry": "cross-only", "batch": 1, "dtype": "float32", "pass": "step", "peer": "compile",
         "outcome": "skipped", "reason": "no compiler"}
    ]  # fmt: skip
    text = printed([row("eager", 3.0), row("sdpa", 0.5), row("fast", 1.0, gradient_error=4e-4)], missing)
    expected = ("3,000 ms", "1,000 ms", "3 MiB", "3.00x", "0.50x", "sdpa", "skipped", "1e-06, 2e-05", "1e-06, 4e-04")
    assert [part for part in expected if part not in text] == []
    assert report.missing_lines(missing) == ["skipped: model, compile on cross-only step: no compiler"]


def test_table_without_ours_or_memory():
    text = printed([row("eager", 3.0, peak_memory_bytes=None, gradient_error=None)], [])
    assert "3,000 ms" in text and "MiB" not in text and "x" not in text.split("3,000 ms", 1)[1].splitlines()[0]


def test_rows_keep_what_pytest_benchmark_measured():
    kept = row("fast", 1.0)
    stats = {key: kept[key] for key in report.STATS} | {"mean": 1.0, "data": [1.0] * 5}
    extra = {key: value for key, value in kept.items() if key not in stats}
    assert report.rows({"benchmarks": [{"stats": stats, "extra_info": extra}]}) == [kept]


def test_conditions_and_slug():
    conditions = environment.conditions(threads=2)
    assert conditions["threads"] == 2 and conditions["perceiver-pytorch"] and conditions["cpu"]
    assert environment.slug("Intel(R) Xeon(R) Processor @ 2.20GHz") == "intel-xeon-processor-2-20ghz"


@pytest.mark.parametrize("module", [environment, output, plot, record, statistic])
def test_examples_of_the_documentation(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_command_line_help():
    finished = python("-m", "benchmarks", "--help", cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert all(option in finished.stdout for option in ("--quick", "--geometry", "--threads", "--json", "--all"))


def test_the_floor_counts_the_latents_products():
    from benchmarks import floor
    from benchmarks.suite.models import fast

    geometry = GEOMETRIES["readme"].tiny()
    shapes = floor.latent_products(fast(geometry).eval(), geometry.input())
    rows, width, heads = 6, 16, 512
    block = [(rows, width, 64), (rows, 64, width), (rows, width, 8 * width), (rows, 4 * width, width)]
    for product in [*block, (rows, width, heads), (rows, width, 2 * heads), (rows, heads, width)]:
        assert product in shapes
    assert len(shapes) == 3 * (4 + 1 * 5)
    for library in ("torch", "onednn"):
        if not floor.reasons(library):
            floor.loop(shapes, library)()


def test_floor_command(monkeypatch, capsys, tmp_path):
    from benchmarks import floor

    monkeypatch.setitem(GEOMETRIES, "readme", GEOMETRIES["readme"].tiny())
    assert floor.main(["--geometry", "readme", "--rounds", "1", "--json", str(tmp_path / "floor.json")]) == 0
    assert "products of the latents" in capsys.readouterr().out
    assert '"loop: torch"' in (tmp_path / "floor.json").read_text()


def test_a_choice_is_judged_by_what_it_loses():
    from benchmarks import choice

    kinds = choice.KINDS
    least = {kind: {"torch": 1.2e-2, "onednn": 1e-2} for kind in kinds}

    def chose(name, sure):
        return {kind: dict(chosen=name, sure=sure, text=f"{name}, sure", seconds=0.2) for kind in kinds}

    found = choice.judged([chose("onednn", True)] * 3, least)
    assert all(row["worst_loss"] == 0 and row["sure"] == 3 and row["chosen"] == {"onednn": 3} for row in found.values())
    found = choice.judged([chose("onednn", True), chose("torch", False)], least)
    assert all(row["worst_loss"] == pytest.approx(0.2) and row["sure"] == 1 for row in found.values())
    runs = [choice.Run(1.0, False), choice.Run(3.0), choice.Run(2.0)]
    assert choice.least_of(runs) == 2.0 and choice.least_of(runs[:1]) == 1.0


def test_choice_command(monkeypatch, capsys, tmp_path):
    from benchmarks import choice

    monkeypatch.setitem(GEOMETRIES, "readme", GEOMETRIES["readme"].tiny())
    command = ["--times", "1", "--busy", "1", "--seconds", "0.1", "--json", str(tmp_path / "choice.json")]
    monkeypatch.setattr(choice, "why_torch", lambda: ["no MKL"])
    assert choice.main(command) == 2 and "nothing is chosen here: no MKL" in capsys.readouterr().err
    monkeypatch.undo()
    if choice.why_torch():
        pytest.skip(f"nothing is chosen here: {choice.why_torch()}; it did NOT run further")
    monkeypatch.setitem(GEOMETRIES, "readme", GEOMETRIES["readme"].tiny())
    code, found = choice.main(command), json.loads((tmp_path / "choice.json").read_text())
    shown = capsys.readouterr().out
    for kind in choice.KINDS:
        row = found["choices"]["1"][kind]
        assert sum(row["chosen"].values()) == 1 and row["worst_loss"] >= 0
    assert len(found["measured"]) == 2 * len(choice.KINDS) * len(choice.PROBLEMS)
    assert set(found["forward"]["seconds"]) == {"torch", "onednn", "auto"} and "readme forward, auto" in shown
    busy = any(row["clean"] < choice.LEAST for row in found["measured"])
    lost = any(row["worst_loss"] > choice.ALLOWED for row in found["choices"]["1"].values())
    assert code == (2 if busy else 1 if lost else 0) and ("too busy" in shown) == busy


def test_decoders_are_compared_and_timed(tmp_path, capsys):
    from benchmarks import decoders

    args = ["--quick", "--case", "field, 262,144 points", "--case", "field, step of 2,048 points x batch 16"]
    assert decoders.main([*args, "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == 2 and all(0 < row["difference"] < 1e-4 and row["ours"] > 0 for row in rows.values())
    assert "over the faster" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are pinned as Linux does it")
def test_cliffs_are_timed_beside_one_core_alone(tmp_path, capsys):
    from benchmarks import cliffs

    name = "on one core later"
    args = ["--geometry", "small", "--rounds", "1", "--only", name, "--json", str(tmp_path / "found.json")]
    assert cliffs.main(args) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    found = {(row["condition"], row["pass"], row["peer"]) for row in rows}
    assert found == {(c, p, peer) for c in (cliffs.ALONE, name) for p in cliffs.PASSES for peer in cliffs.PEERS}
    assert all(row["seconds"] > 0 for row in rows)
    assert cliffs.ALONE in capsys.readouterr().out


def test_a_sweep_times_models_drawn_at_random(tmp_path, capsys):
    from benchmarks import sweep

    args = [
        "--models",
        "2",
        "--seed",
        "13",
        "--rounds",
        "1",
        "--ff-dropout",
        "0.1",
        "--json",
        str(tmp_path / "found.json"),
    ]
    assert sweep.main(args) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["seed"] for row in found["rows"]] == [13, 14] and found["ff_dropout"] == 0.1
    assert all(row[name][side] > 0 for row in found["rows"] for name in sweep.PASSES for side in ("eager", "ours"))
    assert "step: median" in capsys.readouterr().out
    assert sweep.draw(random.Random(13)) == sweep.draw(random.Random(13))
    with pytest.raises(SystemExit):
        sweep.main(["--models", "0"])
    assert "at least one model" in capsys.readouterr().err
