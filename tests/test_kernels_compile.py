"""The Triton kernels without a GPU: what ships compiles for every architecture, spills nothing, keeps to its budgets.

For one architecture that is everything, for the others a variant of every kernel with every configuration and width of
dtype, the last that has dropout. PERCEIVER_FAST_TEST_ALL_KERNELS=1 compiles all for all; so does
``python -m perceiver_fast info --kernels``.

What a kernel needs of a multiprocessor decides how many of its blocks share it, and the compiler says it exactly; so does
how many exponentials a weight costs. It does not say how fast they are.
"""

import importlib.util
import os

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: its kernels were NOT compiled"
)
ARCHITECTURES = (80, 90, 100)
ALL = ARCHITECTURES if os.environ.get("PERCEIVER_FAST_TEST_ALL_KERNELS") == "1" else (90,)


SPILLED_BY_3_6 = {  # local loads and stores, at most, all outside of the loops over tokens: see docs/gpu-diary.md
    "grid_attention_forward[float32, 3 channels]": 4,
    "grid_attention_merge[float32, 8 channels, mask and dropout]": 2,
    "grid_query_attention_dq[bfloat16, 2 axes, 258 channels, 512 of values]": 2,
}


def sample(instances):
    """Indices of one variant of every kernel, configuration and widths: of the last that drops weights, if one does.

    Both half-precision dtypes count as one: where more than a conversion differs, so does PRECISION.
    """
    chosen = {}
    for index, instance in enumerate(instances):
        widths = frozenset(dtype[-2:] for dtype in instance.types.values() if dtype in ("*fp32", "*fp16", "*bf16"))
        key = instance.kernel.__name__, instance.config, instance.constants.get("PRECISION"), widths
        drops = "dropout" in instance.name
        if key not in chosen or drops or not chosen[key][1]:
            chosen[key] = index, drops
    return sorted(index for index, _ in chosen.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_ships_compiles(architecture, record_property, capsys):
    import triton

    from perceiver_fast.insight import gpu_kernels

    found, faults = [], {}
    allowed = SPILLED_BY_3_6 if triton.__version__.startswith("3.6.") else {}
    indices = None if architecture in ALL else sample(gpu_kernels.shipped(architecture))
    for report in gpu_kernels.compile_all(architecture, jobs=1, indices=indices):  # the other core has other tests
        found.append(report)
        compiled, spilled_only = report.compiled, all("local loads" in fault for fault in report.faults)
        few = compiled.spills <= allowed.get(report.name, 0) and not compiled.loop["LDL"] + compiled.loop["STL"]
        if report.faults and not (spilled_only and few):
            faults[report.name] = report.faults
        record_property(report.name, dict(registers=report.compiled.registers, shared=report.compiled.shared))
    assert not faults
    sweeps = [report for report in found if report.exponentials]
    for op in ("grid_attention_forward", "grid_attention_backward", "cross_attention_fwd"):
        for dtype in ("bfloat16", "float16", "float32") if architecture in ALL else ("float32",):
            assert any(report.name.startswith(f"{op}[{dtype}") for report in sweeps), (op, dtype)
    least = 3 if architecture in ALL else 2
    for name in ("layer_norm_forward", "layer_norm_backward", "geglu_forward", "geglu_backward"):
        passes = [report for report in found if report.name.startswith(f"{name}[")]
        assert len(passes) >= least and all("ld.global.v4.b32" in report.compiled.ptx for report in passes), name
    mma = "wgmma.mma_async" if architecture == 90 else "mma.sync"
    assert sum(mma in report.compiled.ptx for report in sweeps) > 10
    with capsys.disabled():
        most = max(report.compiled.registers for report in found)
        print(f"\n  sm_{architecture}: {len(found)} kernels, no spills, at most {most} registers", end="")


def test_faults_are_named():
    """A configuration that cannot fit is found out."""
    from dataclasses import replace

    from perceiver_fast.insight import gpu_kernels
    from perceiver_fast.kernels import aot

    shipped = next(i for i in gpu_kernels.shipped(90) if i.name.startswith("grid_attention_forward[bfloat16, 3"))
    starved = replace(shipped, config=replace(shipped.config, registers=64), registers=64)
    (fault,) = aot.faults(starved, aot.compile_instance(starved, 90), 90)
    assert "local loads and stores" in fault
    less = replace(shipped, weights=shipped.weights // 2)
    assert any("exponentials" in fault for fault in aot.faults(less, aot.compile_instance(less, 90), 90))
