"""Changes that are not visible on modules: patched classes, other attributes, modes, subclasses of tensors, NaN and inf."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from contract_cases import MODELS, Adapted, agree, inputs, modules_of, pair, replace, step
from torch import nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_fast as pf
from perceiver_fast import layers


def test_exchanged_forwards_of_classes_are_called(monkeypatch):
    """People replace the forward of a class to patch a library's attention, or to count calls of nn.Linear."""
    _, ours = pair("perceiver")
    before, call = ours(**inputs("perceiver")), inputs("perceiver")
    for kind in (layers.Attention, layers.FeedForward, layers.GEGLU, layers.PreNorm, layers.PerceiverBlock, nn.Linear):
        with monkeypatch.context() as patch:
            forward, count = kind.forward, []

            def counting(self, *args, forward=forward, count=count, **keywords):
                count.append(self)
                return forward(self, *args, **keywords)

            patch.setattr(kind, "forward", counting)
            agree([ours(**call), before], where=kind)
        expected = [m for m in ours.modules() if type(m) is kind]
        assert sorted(map(id, count)) == sorted(map(id, expected)), kind


@pytest.mark.parametrize("kind", ["PreNorm", "Attention", "FeedForward", "Linear", "Module"])
def test_exchanged_calls_of_classes_are_made(kind, monkeypatch):
    """Tracers and profilers replace ``__call__``."""
    from perceiver_pytorch import perceiver_pytorch as their_module

    results = []
    for model, module in zip(pair("perceiver"), (their_module, layers)):
        owner = getattr(nn, kind, None) or getattr(module, kind)
        with monkeypatch.context() as patch:
            original = owner.__call__

            def half(self, *args, original=original, kind=kind, **keywords):
                out = original(self, *args, **keywords)
                return out * 0.5 if kind != "Module" or type(self) is nn.Linear else out

            patch.setattr(owner, "__call__", half)
            results.append(model(**inputs("perceiver")).detach())
    agree(results)


def data_of_a_subclass(tensor):
    return tensor.as_subclass(Doubled)


@pytest.mark.parametrize("name", ["perceiver", "perceiver dense", "io", "gated", "experimental"])
def test_data_of_a_tensor_subclass(name):
    with torch.no_grad():
        call = inputs(name) | {"data": data_of_a_subclass(inputs(name)["data"])}
        agree([m.eval()(**call).as_subclass(torch.Tensor) for m in pair(name)])


def set_scale(value):
    def change(model):
        for module in model.modules():
            if type(module).__name__.startswith("Attention"):
                module.scale = value()

    return change


@pytest.mark.parametrize("name", MODELS)
def test_a_scale_that_is_a_tensor(name):
    """The scale is changed in place between two calls; and it is a parameter that learns."""
    models = pair(name, change=set_scale(lambda: torch.tensor(0.3)))
    for factor in (1, 8):
        for model in models:
            for module in model.modules():
                if torch.is_tensor(getattr(module, "scale", None)):
                    module.scale.mul_(factor)
        with torch.no_grad():
            agree([m.eval()(**inputs(name)) for m in models])
    agree([step(m, **inputs(name)) for m in pair(name, change=set_scale(lambda: nn.Parameter(torch.tensor(0.3))))])


@pytest.mark.parametrize("name", MODELS)
def test_other_numbers_of_heads(name):
    def change(model):
        for module in model.modules():
            if type(module).__name__.startswith("Attention"):
                module.heads = 4

    agree([step(m, **inputs(name)) for m in pair(name, change=change)])


@pytest.mark.parametrize("name", MODELS)
def test_biases_that_are_no_parameters(name):
    """Meta-learning and hypernetworks put plain tensors in the place of parameters."""

    def change(model):
        for module in model.modules():
            if type(module) in (nn.Linear, nn.LayerNorm) and module.bias is not None:
                bias = module.bias.detach() + 0.1
                del module.bias
                module.bias = bias

    agree([m(**inputs(name)).detach() for m in pair(name, change=change)])


@pytest.mark.parametrize("name", ["perceiver", "io", "block"])
def test_norms_and_biases_of_other_shapes(name):
    rows = 6  # latents

    def over_both(model):
        block = model.cross_attend_block if name == "io" else model.layers[0] if name == "perceiver" else model
        block.cross_ff.norm = nn.LayerNorm((rows, 16))
        nn.init.normal_(block.cross_ff.norm.weight)
        block.cross_attn.fn.to_out.bias = nn.Parameter(torch.full((1,), 0.3))
        block.cross_ff.fn.net[2].bias = nn.Parameter(torch.full((1,), 0.2))

    agree([step(m, **inputs(name)) for m in pair(name, change=over_both)])


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_layers_under_autocast(name):
    def change(model):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.bfloat16()

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = (m(**inputs(name)) for m in pair(name, change=change))
    assert ours.dtype == theirs.dtype and (ours - theirs).float().norm() < 0.05 * theirs.float().norm()


class Mixing(nn.Module):
    """A layer that looks at all queries at once."""

    def __init__(self, base):
        super().__init__()
        self.base, self.rows = base, []
        if hasattr(base, "normalized_shape"):
            self.normalized_shape = base.normalized_shape

    def forward(self, x):
        self.rows.append(x.shape[1])
        x = self.base(x)
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    "where",
    [
        "decoder_cross_attn.norm",
        "decoder_cross_attn.fn.to_q",
        "decoder_cross_attn.fn.to_out",
        "decoder_ff.norm",
        "to_logits",
    ],
)
def test_layers_that_mix_many_queries_get_all_of_them(where, monkeypatch):
    from perceiver_fast.models import perceiver_io

    monkeypatch.setattr(perceiver_io, "DECODER_ROWS", 5)
    models = pair("io", change=lambda m: replace(m, where, Mixing))
    call = inputs("io") | {"queries": torch.randn(12, 10)}
    with torch.no_grad():
        agree([m.eval()(**call) for m in models])
    assert [m.get_submodule(where).rows for m in models] == [[12], [12]]


def test_models_take_what_their_layers_take_now():
    def wider(model):
        for layer in (model.cross_attend_block.cross_attn, model.decoder_cross_attn):
            attention = layer.fn
            if layer is model.decoder_cross_attn:
                layer.norm, attention.to_q = nn.LayerNorm(14), nn.Linear(14, 16, bias=False)
                attention.to_out, model.to_logits = nn.Linear(16, 14), nn.Linear(14, 7)
                model.decoder_ff = None
            else:
                layer.norm_context, attention.to_kv = nn.LayerNorm(20), nn.Linear(20, 32, bias=False)

    call = dict(data=torch.randn(2, 9, 20), queries=torch.randn(5, 14))
    agree([step(m, **call) for m in pair("io", change=wider)])
    call = dict(data=torch.randn(2, 6, 5, 3 + 2 * 9))
    agree([step(m, **call) for m in pair("perceiver", change=lambda m: setattr(m, "fourier_encode_data", False))])


@pytest.mark.parametrize("name", MODELS)
def test_replicas_as_of_data_parallel(name):
    """They have plain tensors in the place of parameters."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for key, value in module._parameters.items():
            if value is not None:
                setattr(replica, key, value * 1)
            else:
                replica._parameters[key] = None
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicate(child)
        return replica

    _, ours = pair(name)
    agree([replicate(ours)(**inputs(name)), ours(**inputs(name))])


class Watching(TorchDispatchMode):
    """Counts operators, as people write such modes."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    """Counts calls of functions: a mode one level above operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_modes_see_torchs_operators(name):
    theirs, ours = pair(name)
    expected = theirs(**inputs(name))
    with Watching() as mode:
        agree([ours(**inputs(name)), expected])
    assert not [n for n in mode.names if n.startswith("perceiver_fast")]
    assert sum(n in ("aten::mm", "aten::addmm", "aten::bmm") for n in mode.names) > 5
    with WatchingFunctions() as mode:
        agree([ours(**inputs(name)), expected])
    assert "linear" in mode.names and "softmax" in mode.names


def test_a_default_device_is_nobody():
    from perceiver_fast.layers.fusing import watcher

    with torch.device("cpu"):
        assert watcher() is None
    with Watching():
        assert watcher() == "Watching looks on"


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_quantization(name):
    results = []
    for model in pair(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, torch.qint8)
        results.append(quantized(**inputs(name)))
    agree(results, 2e-5)


class Doubled(torch.Tensor):
    """A subclass of Tensor whose products mean something else, as those of quantized and sharded weights do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs)
        return 2 * out.as_subclass(torch.Tensor) if func is F.linear else out


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_a_tensor_subclass(name):
    for where in modules_of(name, nn.Linear):

        def change(model):
            layer = model.get_submodule(where)
            layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Doubled), requires_grad=False)

        with torch.no_grad():
            agree([m.eval()(**inputs(name)) for m in pair(name, change=change)], where=where)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_finite_shows(name, value):
    """With NaN or inf in any weight or input, our output is not finite where perceiver-pytorch's is not."""
    theirs, ours = pair(name)
    for (where, p), (_, q) in zip(sorted(theirs.named_parameters()), sorted(ours.named_parameters())):
        with torch.no_grad():
            kept = p[0].clone()
            p[0], q[0] = value, value
            expected, actual = (m.eval()(**inputs(name)) for m in (theirs, ours))
            p[0], q[0] = kept, kept
        assert (actual.isfinite() <= expected.isfinite()).all(), where
    for key, given in inputs(name).items():
        if given.is_floating_point():
            call = inputs(name)
            call[key].view(-1)[3] = value
            expected, actual = (m.eval()(**call) for m in (theirs, ours))
            assert (actual.isfinite() <= expected.isfinite()).all(), key


def test_explain_names_what_is_not_fused_and_why():
    model, data = (
        pf.Perceiver(num_freq_bands=2, depth=2, max_freq=4.0, num_latents=4, latent_dim=8),
        torch.randn(1, 6, 5, 3),
    )
    model.layers[0].cross_attn.fn.to_kv.register_forward_hook(lambda *a: None)
    model.layers[1].self_attns[0][1].fn.net[0] = Adapted(model.layers[1].self_attns[0][1].fn.net[0])
    text = str(pf.explain(model, data))
    assert "not fused: fn.to_kv has a hook" in text
    assert "not fused: net.0 is of class Adapted" in text
    found = {path.layer: path for path in pf.explain(model, data).layers}
    assert found["layers.0.cross_attn"].path == "modules" and found["layers.1.cross_attn"].path == "grid"
    io = pair("io")[1]
    assert any(path.layer == "decoder_ff" for path in pf.explain(io, **inputs("io")).layers)
    maps = pf.attention_map(model, data)
    del model.layers[0].cross_attn.fn.to_kv._forward_hooks[
        next(iter(model.layers[0].cross_attn.fn.to_kv._forward_hooks))
    ]
    agree([maps, pf.attention_map(model, data)])


@pytest.mark.parametrize("name", ["perceiver", "io", "gated", "experimental"])
def test_parametrized_latents_are_computed_once(name):
    """Spectral norm takes a step of its power iteration at every access to the latents, so their number counts."""
    results = []
    for model in pair(name, change=lambda m: parametrizations.spectral_norm(m, "latents")):
        model.train()
        for _ in range(3):
            results.append(model(**inputs(name)).detach())
    agree([results[:3], results[3:]])
