"""Every op keeps what its declaration says: this file has no list of ops, so that a new one is tested once it is declared."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from support import NoSync, needs_extension
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import perceiver_fast.ops
from perceiver_fast import reference
from perceiver_fast.backends import NAMES
from perceiver_fast.ops.declaration import OPERATORS, OPS
from perceiver_fast.ops.work import Work

SAMPLES = [pytest.param(name, variant, id=f"{name}-{variant}") for name, op in OPS.items() for variant in op.variants]
ROOT = Path(__file__).parents[2]


def recorded(name, **options):
    torch.manual_seed(0)
    return OPS[name].recorded_calls("cpu", **options)


def test_every_registered_operator_is_declared():
    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if "perceiver_fast::" in name
    }
    names.discard("axis_codes")  # the tokens': position codes that a graph does not compute again
    names -= {"grid_attention_sums", "grid_attention_gradient_sums"}  # the CUDA library's parts of declared ones
    assert names == set(OPERATORS)


@pytest.mark.parametrize("name", OPS)
def test_one_stem_in_every_room(name):
    op = OPS[name]
    assert inspect.getdoc(importlib.import_module(f"perceiver_fast.ops.{name}"))
    assert hasattr(reference, name) or hasattr(reference, f"add_{name}")
    assert hasattr(perceiver_fast.ops, name) and name in perceiver_fast.ops.__all__
    assert (ROOT / f"tests/ops/test_{name}.py").exists()
    assert all(operator.name.startswith(f"{name}_") for operator in op.operators)
    used = {backend.name for backend in op.backends}
    assert used <= {*NAMES, "sdpa"} and op.backends[-1].name == "reference" and op.backends[-1].reasons(None) == []
    assert not used & {"triton"} or all(operator.triton for operator in op.operators)


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("name,options", SAMPLES)
def test_a_sample_calls_every_operator_once(name, options):
    assert [operator for operator, _ in recorded(name, **options)] == list(OPS[name].operators)


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("name,options", SAMPLES)
def test_operators_are_registered_well(name, options):
    """Schema, outputs without content against real ones, and tracing, by torch's own checks."""
    for operator, arguments in recorded(name, **options):
        torch.library.opcheck(operator.packet.default, arguments)


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("name,options", SAMPLES)
def test_outputs_without_content_are_those_of_the_kernel(name, options):
    real, meta = (OPS[name].run_sample(device, **options) for device in ("cpu", "meta"))
    assert [(t.shape, t.dtype) for t in real] == [(t.shape, t.dtype) for t in meta]


@pytest.mark.parametrize("name", OPS)
def test_an_ordinary_call_has_a_backend_everywhere(name):
    for device in ("cpu", "cuda"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            choice = OPS[name].choose(OPS[name].call(dtype, torch.device(device)))
            assert choice.backend in {backend.name for backend in OPS[name].backends}, (device, dtype)


@pytest.mark.skipif(**needs_extension)
@pytest.mark.parametrize("name,options", SAMPLES)
def test_torchs_counter_counts_the_declared_work(name, options):
    declared = sum((operator.count(arguments) for operator, arguments in recorded(name, **options)), Work())
    with FlopCounterMode(display=False) as counter:
        OPS[name].run_sample("cpu", **options)
    assert counter.get_total_flops() == 2 * declared.multiply_adds
    assert all(operator.packet in flop_registry for operator in OPS[name].operators)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: NOT tested here")
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.instances])
def test_instances_launch_declared_kernels(name):
    """What is compiled ahead of time has the names that profilers filter by, and its launches ask nothing of the host."""
    from perceiver_fast.gpu import assumed
    from perceiver_fast.kernels.launch import collected
    from perceiver_fast.ops.declaration import replaced

    for options in OPS[name].instances.values():
        with assumed(90), collected() as launches, NoSync():
            with replaced(lambda operator, arguments: operator.triton_kernel()(*arguments)):
                OPS[name].run_sample("meta", **options)
        assert launches
        for launch in launches:
            assert re.fullmatch(OPS[name].kernels, launch.kernel.__name__), launch.kernel.__name__


def test_triton_functions_take_the_schemas_arguments():
    pytest.importorskip("triton", reason="triton is not installed: NOT tested here")
    for operator in OPERATORS.values():
        if operator.triton is not None:
            expected = [argument.name for argument in operator.packet.default._schema.arguments]
            assert list(inspect.signature(operator.triton_kernel()).parameters) == expected, operator.name
