"""The benchmarks' own parts: geometries, peers, checks, tables and the command line. Nothing is timed here."""

import functools
import io
import operator
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed; a bare `pytest` does not look here

pytest.importorskip("perceiver_pytorch")

from rich.console import Console  # noqa: E402

from benchmarks import report, test_grid_attention, test_models  # noqa: E402
from benchmarks.geometries import GEOMETRIES, select  # noqa: E402
from benchmarks.measure import errors  # noqa: E402
from benchmarks.memory import memory_method, peak_memory  # noqa: E402
from benchmarks.peers import PEERS, SDPAAttention, eager, parameters, sdpa  # noqa: E402


def tiny(name):
    """The geometry with the same structure and few of everything."""
    geometry = GEOMETRIES[name]
    small = {"num_latents": 6, "latent_dim": 16, "num_classes": 5, "depth": min(3, geometry.model["depth"])}
    small = {key: value for key, value in small.items() if key in geometry.model}
    return replace(geometry, sizes=(5, 6, 4)[: len(geometry.sizes)], model={**geometry.model, **small})


@pytest.mark.parametrize("pass_name", test_models.PASSES)
@pytest.mark.parametrize("peer", ["sdpa", "fast"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_models_agree_on_every_geometry(name, peer, pass_name):
    if PEERS[peer].reasons():
        pytest.skip("; ".join(PEERS[peer].reasons()))
    geometry = tiny(name)
    assert list(parameters(PEERS[peer].build(geometry))) == list(parameters(eager(geometry)))
    results, truths = test_models.build(peer, pass_name, geometry)(), test_models.truth(pass_name, geometry)
    found = errors(results, truths, test_models.dtype_of(pass_name))
    assert (found["gradient_error"] is None) == (pass_name != "step")


@pytest.mark.parametrize("pass_name", test_grid_attention.PASSES)
@pytest.mark.parametrize("name", [name for name in GEOMETRIES if "op" in GEOMETRIES[name].levels])
def test_sides_of_the_op_agree(name, pass_name):
    sides = [test_grid_attention.build(peer, pass_name, tiny(name)) for peer in ("sdpa", "reference")]
    dense, grid = (side.common(side.call()) for side in sides)
    assert len(dense) == len(grid) == {"forward": 1, "step": 2, "step+tokens": 4}[pass_name]
    errors(grid, dense)


def test_sdpa_peer_keeps_masks_and_state():
    geometry = tiny("readme")
    model, changed = eager(geometry), sdpa(geometry)
    assert {type(m) for m in changed.modules() if "Attention" in type(m).__name__} == {SDPAAttention}
    changed.load_state_dict(model.state_dict())
    data = geometry.input().expand(3, *geometry.sizes, -1) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)
    mask = torch.rand(3, *geometry.sizes, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1] = False  # attends uniformly
    results = []
    for module in (changed, model):
        out = module(data, mask=mask)
        grads = torch.autograd.grad(out.square().sum(), tuple(parameters(module).values()))
        results.append((out, *grads))
    errors(*results)


@pytest.mark.parametrize("arguments", [{"queries_contribute_kv": True}, {}])
def test_sdpa_attention_leaves_the_rest_to_the_original(arguments):
    torch.manual_seed(0)
    attention = SDPAAttention(8, 8, heads=2, dim_head=4, **arguments)
    inverted = not arguments
    x, context, mask = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 5) > 0.3
    call = {"context": context, "mask": mask, "inverted_attention": inverted}
    assert torch.equal(attention(x, **call), super(SDPAAttention, attention).forward(x, **call))


def test_errors_refuse_wrong_results():
    right = (torch.ones(4), torch.ones(4))
    assert errors(right, right) == {"relative_error": 0.0, "gradient_error": 0.0}
    with pytest.raises(AssertionError, match="the output is off by 1.00e-02"):
        errors((torch.full((4,), 1.01),), right[:1])
    with pytest.raises(AssertionError, match="the gradients are off"):
        errors((torch.ones(4), torch.full((4,), float("nan"))), right)
    with pytest.raises(AssertionError, match="the gradients are off"):  # python's max() forgets a NaN that is not first
        errors((torch.ones(4), torch.ones(4), torch.full((4,), float("nan"))), (*right, torch.ones(4)))


def test_peak_memory_is_that_of_the_call():
    if memory_method().startswith("not measured"):
        pytest.skip(memory_method())
    peak = peak_memory(functools.partial, operator.mul, b"x", 64 * 2**20)  # bytes of that length
    assert 63 * 2**20 < peak < 66 * 2**20
    with pytest.raises(RuntimeError, match="exit code 3"):
        peak_memory(sys.exit, 3)


def test_selection():
    assert "imagenet-lucid" not in select([], False)
    assert select([], True) == list(GEOMETRIES)
    assert select(["video"], False) == ["video"]


def row(peer, seconds, **changes):
    return {
        "level": "model", "geometry": "cross-only", "pass": "step", "peer": peer, "tokens": 12, "dtype": "float32",
        "threads": 2, "median": seconds, "min": seconds, "rounds": 5, "relative_error": 1e-6, "gradient_error": 2e-5,
        "peak_memory_bytes": 3 * 2**20, "peak_memory_method": "by hand", **changes,
    }  # fmt: skip


def printed(rows, missing):
    console = Console(file=io.StringIO(), width=120)
    for table in report.tables(rows, missing):
        console.print(table)
    return console.file.getvalue()


def test_tables_show_ratios_losses_and_what_is_missing():
    missing = [
        {"level": "model", "geometry": "cross-only", "pass": "step", "peer": "compile", "outcome": "skipped",
         "reason": "no compiler"}
    ]  # fmt: skip
    text = printed([row("eager", 3.0), row("sdpa", 0.5), row("fast", 1.0, gradient_error=4e-4)], missing)
    for expected in ("3,000 ms", "1,000 ms", "3 MiB", "3.00x", "0.50x", "sdpa", "skipped", "not run", "4.0e-04"):
        assert expected in text
    assert report.missing_lines(missing) == ["skipped: model, compile on cross-only step: no compiler"]


def test_table_without_ours_or_memory():
    text = printed([row("eager", 3.0, peak_memory_bytes=None, gradient_error=None)], [])
    assert "3,000 ms" in text and "MiB" not in text and "x" not in text.split("3,000 ms", 1)[1].splitlines()[0]


def test_rows_keep_what_pytest_benchmark_measured():
    kept = row("fast", 1.0)
    stats = {key: kept[key] for key in ("median", "min", "rounds")} | {"mean": 1.0, "data": [1.0] * 5}
    extra = {key: value for key, value in kept.items() if key not in stats}
    assert report.rows({"benchmarks": [{"stats": stats, "extra_info": extra}]}) == [kept]


def test_conditions_and_slug():
    conditions = report.conditions(threads=2)
    assert conditions["threads"] == 2 and conditions["perceiver-pytorch"] and conditions["cpu"]
    assert report.slug("Intel(R) Xeon(R) Processor @ 2.20GHz") == "intel-xeon-processor-2-20ghz"


def test_command_line_help():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    finished = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert all(option in finished.stdout for option in ("--quick", "--geometry", "--threads", "--json", "--all"))


def test_the_floor_counts_the_latents_products():
    from benchmarks import floor
    from benchmarks.peers import fast

    geometry = tiny("readme")
    shapes = floor.latent_products(fast(geometry).eval(), geometry.input())
    rows, width, heads = 6, 16, 512
    block = [(rows, width, 64), (rows, 64, width), (rows, width, 8 * width), (rows, 4 * width, width)]
    for product in [*block, (rows, width, heads), (rows, width, 2 * heads), (rows, heads, width)]:
        assert product in shapes
    assert len(shapes) == 3 * (4 + 2 * 5)
    for library in ("torch", "mkl", "onednn"):
        if not floor.reasons(library):
            floor.loop(shapes, library)()


def test_floor_command(monkeypatch, capsys, tmp_path):
    from benchmarks import floor

    monkeypatch.setitem(GEOMETRIES, "readme", tiny("readme"))
    assert floor.main(["--geometry", "readme", "--rounds", "1", "--json", str(tmp_path / "floor.json")]) == 0
    assert "products of the latents" in capsys.readouterr().out
    assert '"loop: torch"' in (tmp_path / "floor.json").read_text()


def test_a_batch_is_a_batch():
    geometry = replace(tiny("readme-4"), batch=3)
    data = geometry.input()
    assert data.shape[0] == 3 and not torch.equal(data[0], data[1])
    assert geometry.eager_bytes == 3 * replace(geometry, batch=1).eager_bytes
