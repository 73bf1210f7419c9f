"""Layers that are more than their parameters, or others than they were: adapters, pruning, quantization, one's own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from contract_cases import MODELS, agree, inputs, modules_of, pair, step
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import perceiver_fast as pf
from perceiver_fast import layers


class Adapted(nn.Module):
    """An adapter around a layer, as people write it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 3, bias=False)
        self.up = nn.Linear(3, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class AdaptedLinear(nn.Linear):
    """The same as a subclass."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(0.2 * torch.randn(3, base.in_features))
        self.up = nn.Parameter(0.2 * torch.randn(base.out_features, 3))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def with_bias(base):
    new = nn.Linear(base.in_features, base.out_features)
    new.weight = base.weight
    return new


def without_bias(base):
    new = nn.Linear(base.in_features, base.out_features, bias=False)
    new.weight = base.weight
    return new


def pruned(base):
    return prune.l1_unstructured(base, "weight", 0.5)


def weight_normed(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(base)


def parametrized(base):
    parametrize.register_parametrization(base, "weight", nn.Hardtanh(-0.05, 0.05))
    return base


def its_own_forward(base):
    base.forward = lambda x: 2 * F.linear(x, base.weight, base.bias)
    return base


LINEAR = [Adapted, AdaptedLinear, with_bias, without_bias, pruned, weight_normed, parametrized, its_own_forward]
LINEAR.append(parametrizations.orthogonal)


def replace(model, where, change):
    parent, _, name = where.rpartition(".")
    owner = model.get_submodule(parent)
    new = change(owner._modules[name])
    owner._modules[name] = new


@pytest.mark.parametrize("change", LINEAR, ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_one_by_one(name, change):
    for where in modules_of(name, nn.Linear):
        models = pair(name, change=lambda m: replace(m, where, change))
        agree([step(m, **inputs(name)) for m in models], where=where)


@pytest.mark.parametrize("change", [Adapted, pruned, weight_normed], ids=lambda c: c.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_all_linear_layers_at_once_in_training(name, change):
    """Three steps of an optimizer, and the outputs after them."""

    def all_of_them(model):
        for where in modules_of(name, nn.Linear):
            replace(model, where, change)

    results = []
    for model in pair(name, change=all_of_them):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(**inputs(name)).square().mean().backward()
            optimizer.step()
        results.append(model.eval()(**inputs(name)).detach())
    agree(results, 1e-4)


def norms(width):
    return [
        nn.RMSNorm(width),
        nn.LayerNorm(width, bias=False),
        nn.LayerNorm(width, elementwise_affine=False),
        nn.LayerNorm(width, eps=0.1),
        nn.Identity(),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("name", MODELS)
def test_norms_of_other_kinds(name, index):
    for where in modules_of(name, nn.LayerNorm):
        models = pair(name, change=lambda m: replace(m, where, lambda old: norms(old.normalized_shape[0])[index]))
        agree([step(m, **inputs(name)) for m in models], where=where)


class Own(nn.Module):
    """A layer of one's own in the place of another; it says what it was given."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.linear, self.given = nn.LayerNorm(width), nn.Linear(width, width), None

    def forward(self, x, **keywords):
        self.given = {k: (type(v), getattr(v, "shape", v)) for k, v in keywords.items()}
        context = keywords.get("context")
        return self.linear(self.norm(x)) + (0.0 if context is None else context.mean())


class Pass(nn.Module):
    """An identity that takes a context."""

    def forward(self, x, **keywords):
        return x


@pytest.mark.parametrize("name", MODELS)
def test_whole_layers_replaced(name):
    from perceiver_pytorch.perceiver_io import PreNorm as their_io_norm
    from perceiver_pytorch.perceiver_pytorch import PreNorm as their_norm

    for where in modules_of(name, (their_norm, their_io_norm)):
        if "decoder" in where:  # of another width
            continue
        models = pair(name, change=lambda m: replace(m, where, lambda old: Own(old.norm.normalized_shape[0])))
        agree([step(m, **inputs(name)) for m in models], where=where)
        given = [m.get_submodule(where).given for m in models]
        assert given[0] == given[1], where
        models = pair(name, change=lambda m: replace(m, where, lambda old: Pass()))
        agree([step(m, **inputs(name)) for m in models], where=where)


class Block(nn.Module):
    """A block of one's own: it gets what perceiver-pytorch's blocks get."""

    def __init__(self, width=16):
        super().__init__()
        self.given, self.linear = None, nn.Linear(width, width)

    def forward(self, x, context=None, mask=None, inverted_attention=False):
        self.given = type(x), x.shape, type(context), getattr(context, "shape", None), mask, inverted_attention
        return x + self.linear(x) + (0.0 if context is None else context.mean())


@pytest.mark.parametrize("name", ["perceiver", "perceiver dense", "io"])
def test_blocks_replaced(name):
    for where in ("layers.0", "layers.1"):
        models = pair(name, change=lambda m: replace(m, where, lambda old: Block()), depth=2)
        agree([step(m, **inputs(name)) for m in models])
        given = [m.get_submodule(where).given for m in models]
        assert given[0] == given[1]


class Counted(nn.Module):
    """In the place of the dropout of attention weights: it sees them all."""

    def forward(self, weights):
        self.shape = weights.shape
        return weights * 0.5


@pytest.mark.parametrize("new", [nn.Identity, Counted, lambda: nn.Dropout1d(0.0)])
@pytest.mark.parametrize("name", MODELS)
def test_dropout_replaced(name, new):
    for where in modules_of(name, nn.Dropout):
        models = pair(name, change=lambda m: replace(m, where, lambda old: new()))
        agree([step(m, **inputs(name)) for m in models], where=where)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_probability_one_of_a_layer_that_learns(name):
    """All weights dropped, in training mode alone: no number is drawn differently."""
    for where in modules_of(name, nn.Dropout):
        models = pair(name, change=lambda m: setattr(m.get_submodule(where), "p", 1.0))
        agree([m.train()(**inputs(name)).detach() for m in models], where=where)
        agree([m.eval()(**inputs(name)).detach() for m in models], where=where)


@pytest.mark.parametrize("name", MODELS)
def test_plain_attributes_count(name):
    """``scale`` of an attention, ``eps`` of a norm and ``p`` of a dropout may be set after building."""
    from perceiver_pytorch.perceiver_io import Attention as their_io_attention
    from perceiver_pytorch.perceiver_pytorch import Attention as their_attention

    for where in modules_of(name, (their_attention, their_io_attention)):
        models = pair(name, change=lambda m: setattr(m.get_submodule(where), "scale", 0.9))
        with torch.no_grad():
            agree([m.eval()(**inputs(name)) for m in models], where=where)


def test_exchanged_forwards_of_classes_are_called(monkeypatch):
    """As people patch another library's attention, or count calls of nn.Linear."""
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
    """``__call__`` in the place of ``forward``: as tracers and profilers do it."""
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
    """Changed in place between two calls, and learned."""
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
    """As meta-learning and hypernetworks put them there."""

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
    """The same one level up."""

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
    """A tensor subclass whose products are something else, as quantized and sharded weights are."""

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
    """In any weight or input: where perceiver-pytorch's output is not finite, ours is not."""
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
    """Spectral norm takes a step of its power iteration each time that the latents are asked for."""
    results = []
    for model in pair(name, change=lambda m: parametrizations.spectral_norm(m, "latents")):
        model.train()
        for _ in range(3):
            results.append(model(**inputs(name)).detach())
    agree([results[:3], results[3:]])
