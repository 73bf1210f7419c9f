"""Models as graphs: traced, exported for any size, in ONNX, counted, on the meta device."""

import io
import warnings

import pytest
import torch
from contract_cases import MODELS, agree, draw, inputs, pair
from torch import nn
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import perceiver_fast as pf
from perceiver_fast.ops.declaration import OPERATORS


class Positional(nn.Module):
    """A model called by position, as torch.jit.trace calls."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values):
        return self.model(**dict(zip(self.names, values)))


def test_tracing_checks_itself():
    """torch.jit.trace checks its trace by a second one, made without gradients."""
    for name in ("perceiver", "io", "gated"):
        _, ours = pair(name)
        call = inputs(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(Positional(ours.eval(), call), tuple(call.values()))


@pytest.mark.parametrize("name", MODELS)
def test_traced_by_make_fx(name):
    _, ours = pair(name)
    call = inputs(name)
    traced = make_fx(lambda *values: ours.eval()(**dict(zip(call, values))))(*call.values())
    agree([traced(*call.values()), ours(**call)])


@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_traced_models_hold_torchs_operators_alone(name, learning):
    _, ours = pair(name)
    call, file = inputs(name), io.BytesIO()
    with torch.set_grad_enabled(learning), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Positional(ours.eval(), call), tuple(call.values()), check_trace=False)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not [kind for kind in kinds if not kind.startswith(("aten::", "prim::"))] and "prim::PythonOp" not in kinds
    torch.jit.save(traced, file)
    file.seek(0)
    other = inputs(name, seed=7)
    agree([torch.jit.load(file)(*other.values()), ours(**other)])


def dynamic(name, call):
    """Which dimensions of the inputs are exported for any size: the batch and all lengths."""
    batch, tokens, rows = Dim("batch", max=64), Dim("tokens", min=2, max=5000), Dim("rows", min=2, max=5000)
    height, width = Dim("height", min=2, max=500), Dim("width", min=2, max=500)
    if name in ("io", "block", "block joined"):
        lengths = {
            "data": {1: tokens},
            "context": {1: tokens},
            "mask": {1: tokens},
            "queries": {1: rows},
            "x": {1: rows},
        }
    elif name == "lm":
        lengths = {"x": {1: Dim("tokens", min=2, max=16)}}
    else:
        lengths = {"data": {1: height, 2: width}, "mask": {1: height, 2: width}}
    return {key: {0: batch} | lengths[key] for key in call}


def resized(call, dims):
    """Inputs that have other sizes in all those dimensions."""
    sizes, out = {}, {}
    for key, value in call.items():
        shape = list(value.shape)
        for axis, dim in dims[key].items():
            shape[axis] = sizes.setdefault(dim.__name__, value.shape[axis] + 2 + len(sizes))
        if value.dtype == torch.bool:
            out[key] = draw(3, *shape) > -0.5
        else:
            out[key] = draw(4, *shape) if value.is_floating_point() else torch.randint(0, 20, shape)
    return out


# Exported models take seconds each; traced, all are looked at. "io" holds what is left out, dense tokens and PerceiverBlock.
EXPORTED = [name for name in MODELS if name not in ("perceiver dense", "block")]


@pytest.mark.parametrize(
    "name, strict", [*((name, False) for name in EXPORTED), ("perceiver", True), ("io", True), ("experimental", True)]
)
def test_exported_for_any_batch_and_length(name, strict):
    _, ours = pair(name)
    call = inputs(name)
    dims = dynamic(name, call)
    exported = export(ours.eval(), (), kwargs=call, dynamic_shapes=dims, strict=strict)
    check_operators(exported)
    program = exported.module()
    for other in (call, resized(call, dims)):
        agree([program(**other), ours(**other)])


def check_operators(exported):
    """The program calls kernels of ours, and no operator that a process without Python lacks."""
    graphs = [module.graph for module in exported.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    ours = {name.split(".")[1] for name in called if name.startswith("perceiver_fast.")}
    assert ours and ours <= set(OPERATORS), ours


@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_computes_the_same(name):
    onnx = pytest.importorskip("onnx.reference")
    _, ours = pair(name)
    call = inputs(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(ours.eval(), (), kwargs=call, dynamo=True, verbose=False)
        expected = ours(**call)
    graph = program.model_proto.graph
    assert {node.domain for node in graph.node} <= {""}  # no function that only torch or we know
    values = {given.name: value.numpy() for given, value in zip(graph.input, call.values())}
    (actual,) = onnx.ReferenceEvaluator(program.model_proto).run(None, values)
    agree([torch.from_numpy(actual), expected])


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_what_runs(name):
    """Under a counter models run as they do without it: no more than perceiver-pytorch's, and mostly its own."""
    counts = []
    for model in pair(name):
        with FlopCounterMode(display=False) as counter:
            model.eval()(**inputs(name))
        counts.append(counter.get_total_flops())
    assert 0.2 * counts[0] < counts[1] <= counts[0]


@pytest.mark.parametrize("name", MODELS)
def test_meta_tensors_give_shapes(name):
    _, ours, arguments, _ = MODELS[name]
    call = inputs(name)
    expected = ours(**arguments)(**call)
    with torch.device("meta"):
        model = ours(**arguments)
    out = model(**{key: value.to("meta") for key, value in call.items()})
    assert out.device.type == "meta" and out.shape == expected.shape
    out.sum().backward()
    assert all(p.grad.device.type == "meta" for p in model.parameters() if p.grad is not None)


def test_meta_tensors_take_no_memory():
    """On the meta device an hour of video takes no memory, though its N x M logits would be petabytes."""
    with torch.device("meta"):
        model = pf.Perceiver(num_freq_bands=6, depth=1, max_freq=10.0, input_axis=3)
        assert model(torch.empty(64, 108_000, 1080, 1920, 3)).shape == (64, 1000)
