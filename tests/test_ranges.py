"""Named ranges: what a profiler sees of layers and ops, and that nothing else changes."""

import os

import pytest
import torch
from support import needs_extension
from warm_python import python

import perceiver_fast as pf
from perceiver_fast import ranges as ranges_class
from perceiver_fast.ops import __all__ as op_names
from perceiver_fast.ranges import OPS, op_range, ranges_kind

SMALL = dict(
    num_freq_bands=2, depth=3, max_freq=4.0, num_latents=4, latent_dim=16, latent_heads=2, latent_dim_head=8,
    num_classes=5,
)  # fmt: skip
MANY = SMALL | dict(num_latents=513)  # more than layers are run together for
LAYERS = ("", ".cross_attn", ".cross_ff.fn", ".self_attns.0.0.fn", ".self_attns.0.1.fn")


@pytest.fixture(autouse=True)
def ranges_off():
    with pf.ranges(kind="off"):
        yield


def seen(call):
    """Names of the ranges that torch.profiler sees in a call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events() if event.is_user_annotation}


def stepper(model, data):
    return lambda: model(data).square().sum().backward()


@pytest.mark.skipif(**needs_extension)
def test_layers_and_ops_are_named_in_forward_and_backward_and_only_when_asked_for():
    model, data = pf.Perceiver(**MANY), torch.randn(2, 6, 5, 3, requires_grad=True)
    step = stepper(model, data)
    assert seen(step) == set()
    with pf.ranges(model):
        names = seen(step)
    layers = {f"layers.{i}{part}" for i in range(3) for part in LAYERS}
    forward = {"describe", "grid_attention", "grid_scale", "layer_norm", "linear", "feed_forward", "to_logits"}
    forward.add("self_attention")  # its backward is cross_attention's
    backward = {
        f"{op}.backward" for op in ("grid_attention", "cross_attention", "grid_scale", "layer_norm", "feed_forward")
    }
    assert names == layers | forward | backward
    assert seen(step) == set()
    with pf.ranges():
        names = seen(step)
    assert {"PerceiverBlock", "PreNorm", "Attention", "FeedForward", "Head"} | forward - {"to_logits"} <= names
    assert not any(name.startswith("layers.") for name in names)


@pytest.mark.skipif(**needs_extension)
def test_layers_that_run_together_are_one_range():
    model, data = pf.Perceiver(**SMALL), torch.randn(2, 6, 5, 3)
    with pf.ranges(model):
        names = seen(stepper(model, data))
    ops = {"grid_cross_attention", "latent_layers"}
    layers = {f"layers.{i}{part}" for i in range(3) for part in ("", ".cross_attn")}
    ops |= {"layer_norm"}  # of the head
    assert names == layers | ops | {f"{op}.backward" for op in ops} | {"describe", "grid_scale", "to_logits"}


@pytest.mark.skipif(**needs_extension)
def test_dense_and_point_ways_are_named():
    dense = pf.Perceiver(**SMALL | dict(fourier_encode_data=False))
    points = pf.Perceiver(**SMALL | dict(num_freq_bands=40))  # so many that keys and values are built
    with pf.ranges():
        names = seen(stepper(dense, torch.randn(1, 6, 5, 3)))
        assert {"grid_cross_attention", "grid_cross_attention.backward"} <= names and "grid_attention" not in names
        names = seen(stepper(dense, torch.randn(1, 6, 5, 3, requires_grad=True)))
        assert {"latent_cross_attention", "latent_cross_attention.backward"} <= names and "layer_norm_linear" in names
        names = seen(lambda: points(torch.randn(1, 30, 3), coords=torch.rand(30, 2)).sum().backward())
        assert {"fourier_projection", "fourier_projection.backward", "describe"} <= names
        names = seen(lambda: pf.ops.geglu(torch.randn(3, 8, requires_grad=True)).sum().backward())
        assert names == {"geglu", "geglu.backward"}
        x, weight = torch.randn(512, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
        with pf.use_linear("onednn"):
            names = seen(lambda: pf.ops.linear(x, weight).sum().backward())
        assert names == {"linear", "linear.backward"}


def test_every_op_has_a_range():
    stems = {name.removeprefix("add_") for name in op_names}
    assert stems <= OPS and {f"{stem}.backward" for stem in stems} <= OPS


@pytest.mark.parametrize("variant", ["gated", "mixed_latents", "experimental"])
def test_the_family_is_named(variant):
    model = getattr(pf, variant).Perceiver(**SMALL)
    with pf.ranges(model):
        names = seen(lambda: model(torch.randn(1, 6, 5, 3)))
    expected = {
        "gated": {"layers.0.0", "layers.0.0.fn", "layers.2.1.fn.fn"},
        "mixed_latents": {"layers.0.0", "layers.1.2.fn", "layers.2.3.fn"},
        "experimental": {"layers.0.0", "layers.0.4.fn", "layers.2.6.fn"},
    }
    assert expected[variant] | {"describe", "to_logits"} <= names


def test_multimodal_and_io_are_named():
    audio = pf.Modality("audio", input_channels=1, input_axis=1, num_freq_bands=2, max_freq=8.0)
    model = pf.MultimodalPerceiver([audio], depth=1, num_latents=4, latent_dim=16)
    with pf.ranges(model):
        assert {"describe", "layers.0.cross_attn", "to_logits"} <= seen(lambda: model({"audio": torch.randn(1, 9, 1)}))
    model = pf.PerceiverIO(depth=1, dim=9, queries_dim=6, num_latents=513, latent_dim=16)
    with pf.ranges(model):
        names = seen(lambda: model(torch.randn(1, 9, 9), queries=torch.randn(5, 6)))
    assert {"cross_attend_block.cross_attn", "layers.0.self_attns.0.0.fn", "decoder_cross_attn"} <= names


def test_a_shared_layer_has_the_first_of_its_names():
    model = pf.Perceiver(**SMALL | dict(weight_tie_layers=True))
    with pf.ranges(model):
        names = seen(lambda: model(torch.randn(1, 6, 5, 3)))
    assert {"layers.0", "layers.1", "layers.1.cross_attn"} <= names
    assert not any(name.startswith("layers.2") for name in names)


@pytest.mark.parametrize("train", [False, True])
def test_results_are_the_same_to_the_bit(train):
    model, data = pf.Perceiver(**SMALL | dict(attn_dropout=0.2, ff_dropout=0.2)).train(train), torch.randn(2, 6, 5, 3)

    def results():
        torch.manual_seed(3)
        out = model(data)
        return [out, *torch.autograd.grad(out.square().sum(), model.parameters())]

    plain, way = results(), str(pf.explain(model, data))
    with pf.ranges(model):
        ranged = results()
        assert str(pf.explain(model, data)) == way  # no hook that would change the way
    assert all(torch.equal(a, b) for a, b in zip(plain, ranged, strict=True))


def test_compiled_models_neither_break_nor_recompile_nor_have_ranges():
    model, data = pf.Perceiver(**SMALL | dict(depth=2)), torch.randn(2, 6, 5, 3)
    expected = model(data)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step = stepper(compiled, data)
    with torch._dynamo.config.patch(error_on_recompile=True):
        with pf.ranges(model):
            assert torch.allclose(compiled(data), expected, atol=1e-5)
            step()
            assert seen(step) == set()
        with pf.ranges(kind="record_function"):
            assert seen(step) == set()
        assert seen(step) == set()


def test_a_compiled_layer_has_no_ranges():
    model, data = pf.Perceiver(**SMALL | dict(depth=1)), torch.randn(2, 6, 5, 3)
    latents, tokens = torch.randn(1, 4, 16), [model.describe(data) for _ in range(2)]
    with pf.ranges(model):
        block = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")
        block(latents, tokens[0])
        assert seen(lambda: block(latents, tokens[1])) == set()


@pytest.mark.parametrize("strict", [True, False])
def test_exported_graphs_have_no_ranges(strict):
    model, data = pf.Perceiver(**SMALL | dict(depth=1)).eval(), torch.randn(2, 6, 5, 3)
    with pf.ranges(model):
        exported = torch.export.export(model, (data,), strict=strict)
    assert not [node for node in exported.graph.nodes if "record_function" in str(node.target)]


def test_switching():
    assert ranges_kind() == "off"
    pf.ranges()
    assert ranges_kind() == "auto"
    with pf.ranges(kind="off"):
        assert seen(lambda: pf.ops.geglu(torch.randn(2, 4))) == set()
    assert seen(lambda: pf.ops.geglu(torch.randn(2, 4))) == {"geglu"}
    pf.ranges(kind="off")
    assert ranges_kind() == "off" and seen(lambda: pf.ops.geglu(torch.randn(2, 4))) == set()


def test_a_bad_kind_is_refused_and_changes_nothing(monkeypatch):
    with pytest.raises(ValueError, match="ranges: expected one of 'auto', .* got 'fast'"):
        pf.ranges(kind="fast")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match="expected a torch built with CUDA for 'nvtx'.*use 'record_function'"):
        pf.ranges(kind="nvtx")
    assert ranges_kind() == "off"


@pytest.mark.parametrize("kind", ["nvtx", "auto"])
def test_nvtx_ranges_are_opened_and_closed_also_by_errors(kind, monkeypatch):
    events = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: events.append(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: events.append("pop"))

    @op_range("outer of a test")
    def outer():
        pf.ops.geglu(torch.randn(2, 3))  # 3 is odd

    with pf.ranges(kind=kind):
        with pytest.raises(ValueError):
            outer()
        assert events == ["outer of a test", "geglu", "pop", "pop"]
        shown = seen(lambda: pf.ops.geglu(torch.randn(2, 4)))
    assert events[4:] == ["geglu", "pop"] and shown == ({"geglu"} if kind == "auto" else set())


@pytest.mark.parametrize("value, kind", [("1", "auto"), ("0", "off"), ("record_function", "record_function")])
def test_the_environment_sets_the_initial_kind(value, kind):
    done = _said("from perceiver_fast.ranges import ranges_kind; print(ranges_kind())", value)
    assert done.stdout.strip() == kind


def test_the_environment_has_to_name_a_kind():
    assert "PERCEIVER_FAST_RANGES: expected one of" in _said("import perceiver_fast", "yes").stderr


def _said(code, value):
    return python("-c", code, env=os.environ | {"PERCEIVER_FAST_RANGES": value})


def test_decorated_functions_keep_their_names_and_signatures():
    assert pf.ops.geglu.__name__ == "geglu" and "Shazeer" in pf.ops.geglu.__doc__
    assert ranges_class is pf.ranges
