"""What people do with modules, done to accelerated models: they stay what they look like, and right."""

import copy
import inspect
import pickle

import pytest
import torch
from adapters.perceivers import build, perceiver, transformers
from adapters.test_transformers import assert_same, pair
from torch import nn
from torch.nn.utils import parametrize, prune

import perceiver_fast as pf
from perceiver_fast.adapters.check import run
from perceiver_fast.adapters.forwards import all_stand_ins, stand_ins


def whys(model):
    return {row.why for row in pf.accelerate(model).rows}


def test_nothing_else_changes():
    model, fast, _ = pair("fourier")
    assert type(fast) is type(model) and isinstance(fast, transformers.PreTrainedModel)
    assert list(fast.state_dict()) == list(model.state_dict()) and repr(fast) == repr(model)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in model.named_modules()]
    assert inspect.signature(fast.perceiver.forward) == inspect.signature(model.perceiver.forward)
    assert "forward" not in vars(perceiver.PerceiverModel(fast.config))


def test_twice_is_once_and_restore_undoes():
    model, fast, inputs = pair("fourier")
    before = [stand_in for _, stand_in in all_stand_ins(fast)]
    pf.accelerate(fast)
    assert before == [stand_in for _, stand_in in all_stand_ins(fast)] and len(before) > 10
    assert pf.restore(fast) is fast and not list(all_stand_ins(fast))
    assert vars(fast.perceiver).keys() == vars(model.perceiver).keys()
    assert torch.equal(model(**inputs).logits, fast(**inputs).logits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_stand_on_their_own(copied):
    model, fast, inputs = pair("flow")
    fast(**inputs)
    other = copied(fast)
    inside = list(other.modules())
    for _, stand_in in all_stand_ins(other):
        assert any(stand_in.module is module for module in inside)
    with torch.no_grad():
        for one in (model, other):
            for parameter in one.parameters():
                parameter.add_(0.1)
    assert_same(model, other, inputs)


def test_saved_and_loaded(tmp_path):
    model, fast, inputs = pair("masked lm")
    fast.save_pretrained(tmp_path)
    loaded = transformers.PerceiverForMaskedLM.from_pretrained(tmp_path).double().eval()
    assert not list(all_stand_ins(loaded))
    pf.accelerate(loaded)
    assert_same(model, loaded, inputs)


def test_parameters_are_read_at_the_call():
    """However they change: in place, replaced, loaded, moved to another dtype, tied."""
    model, fast, inputs = pair("fourier")
    for one in (model, fast):
        layer = one.perceiver.encoder.cross_attention.attention.self
        layer.key.weight = nn.Parameter(layer.key.weight.detach() * 2)
        layer.value.bias.data.mul_(3)
        one.perceiver.encoder.self_attends[0] = one.perceiver.encoder.self_attends[1]
    assert_same(model, fast, inputs)
    fast.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}, assign=True)
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})
    assert_same(model, fast, inputs)


HOOKED = (
    "perceiver", "perceiver.input_preprocessor", "perceiver.encoder", "perceiver.encoder.cross_attention",
    "perceiver.encoder.cross_attention.attention.self", "perceiver.encoder.cross_attention.attention.self.key",
    "perceiver.encoder.cross_attention.attention.self.layernorm2", "perceiver.encoder.cross_attention.mlp.dense1",
    "perceiver.encoder.cross_attention.attention.self.dropout", "perceiver.encoder.self_attends.0.layernorm",
    "perceiver.encoder.self_attends.0.attention.output.dense", "perceiver.decoder.decoder",
    "perceiver.decoder.decoder.decoding_cross_attention", "perceiver.decoder.decoder.final_layer",
)  # fmt: skip


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_see_and_change_what_they_did(name):
    model, fast, inputs = pair("flow", 1)
    seen = {}
    for key, one in (("model", model), ("fast", fast)):

        def hook(module, args, kwargs, output, key=key):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point()]
            assert all(type(t) in (torch.Tensor, nn.Parameter) for t in tensors)
            seen.setdefault(key, []).append([t.detach().clone() for t in tensors])
            if isinstance(output, torch.Tensor):
                return output * 1.25
            if isinstance(output, tuple) and type(output) is tuple:
                return (output[0] * 1.25, *output[1:])

        one.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    assert_same(model, fast, inputs)
    assert len(seen["model"]) == len(seen["fast"]) > 0
    for a, b in zip(seen["model"], seen["fast"]):
        assert [t.shape for t in a] == [t.shape for t in b]
        assert all((x - y).abs().max() < 1e-9 * (1 + x.abs().max()) for x, y in zip(a, b))


def test_global_hook():
    model, fast, inputs = pair("fourier")
    names = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        fast(**inputs)
        found, names[:] = list(names), []
        model(**inputs)
    finally:
        handle.remove()
    assert found == names


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False).double()
        self.up = nn.Linear(2, base.out_features, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("targets", [("query", "value"), ("key",), ("dense", "dense1", "dense2"), ("query", "dense2")])
def test_adapters(targets):
    """Projections with an adapter are called; attention around them is still streamed."""
    model, _ = build("flow", 2)
    _, inputs = build("flow", 2)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(module, name, LoRA(child))
    fast = copy.deepcopy(model)
    pf.accelerate(fast)
    assert_same(model, fast, inputs)
    layer = stand_ins(fast.perceiver.encoder.cross_attention)["forward"]
    assert layer.why is None and layer.way is not None


def test_pruned_and_parametrized():
    model, fast, inputs = pair("fourier")
    for one in (model, fast):
        layer = one.perceiver.encoder.cross_attention.attention.self
        prune.l1_unstructured(layer.key, "weight", 0.5)
        parametrize.register_parametrization(layer.value, "weight", nn.Tanh())
        nn.utils.parametrizations.weight_norm(one.perceiver.encoder.self_attends[0].mlp.dense1)
    assert_same(model, fast, inputs)


def test_quantized():
    model, inputs = build("fourier", dtype=torch.float32)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    fast = copy.deepcopy(quantized)
    pf.accelerate(fast)
    with torch.no_grad():
        a, b = quantized(**inputs).logits, fast(**inputs).logits
    assert (a - b).abs().max() < 0.02 * a.abs().max()  # activations are quantized: a rounding may flip


def test_quantized_weights():
    torchao = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: quantized weights were NOT tested"
    )
    model, inputs = build("masked lm", dtype=torch.float32)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    fast = copy.deepcopy(model)
    pf.accelerate(fast)
    with torch.no_grad():
        a, b = model(**inputs).logits, fast(**inputs).logits
    assert (a - b).abs().max() < 1e-5 * a.abs().max()
    check = pf.accelerate(fast, inputs).check
    assert check.dtype == "float32" and check.gradient_error is None and "cannot be float64" in str(check)


def test_offloaded():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: offloading was NOT tested")
    model, fast, inputs = pair("fourier", dtype=torch.float32)
    accelerate.cpu_offload(fast, execution_device="cpu")
    with torch.no_grad():
        expected = model(**inputs).logits
        assert (expected - fast(**inputs).logits).abs().max() < 1e-5
        after = copy.deepcopy(model)
        accelerate.cpu_offload(after, execution_device="cpu")
        report = pf.accelerate(after)
        assert (expected - after(**inputs).logits).abs().max() < 1e-5
    assert "streamed: keys and values by their modules" in {row.way for row in report.rows}


def test_replaced_class_method(monkeypatch):
    model, fast, inputs = pair("fourier")
    forward = perceiver.PerceiverMLP.forward
    monkeypatch.setattr(perceiver.PerceiverMLP, "forward", lambda self, x: forward(self, x) * 2)
    assert_same(model, fast, inputs)
    assert "PerceiverMLP.forward was exchanged" in whys(fast)


def test_a_subclass_is_left_alone():
    model, fast, inputs = pair("fourier")

    class Mine(perceiver.PerceiverMLP):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 3

    for one in (model, fast):
        one.perceiver.encoder.self_attends[0].mlp.__class__ = Mine
    assert_same(model, fast, inputs)


def test_transforms_and_functional_calls():
    model, fast, inputs = pair("fourier", 1)
    found = []
    for one in (model, fast):
        parameters = {name: p.detach() for name, p in one.named_parameters()}

        def loss(parameters, one=one):
            return torch.func.functional_call(one, parameters, kwargs=inputs).logits.square().sum()

        found.append(torch.func.grad(loss)(parameters))
    for name, a in found[0].items():
        assert (a - found[1][name]).abs().max() <= 1e-9 * a.abs().max() + 1e-12, name


def test_checkpointing_around_layers():
    model, fast, inputs = pair("fourier")
    expected = run(model, (), inputs, True)
    encoder = fast.perceiver.encoder
    layers = [layer.forward for layer in encoder.self_attends]
    for layer, forward in zip(encoder.self_attends, layers):

        def again(*args, forward=forward, **kwargs):
            return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

        layer.forward = again
    actual = run(fast, (), inputs, True)
    for name, a in expected.gradients.items():
        assert (a - actual.gradients[name]).abs().max() <= 1e-9 * a.abs().max() + 1e-9, name


def test_frozen_parts_and_inference_mode():
    model, fast, inputs = pair("multimodal")
    for one in (model, fast):
        one.perceiver.encoder.requires_grad_(False)
    assert_same(model, fast, inputs)
    with torch.inference_mode():
        a, b = model(**inputs).logits, fast(**inputs).logits
        assert all((a[k] - b[k]).abs().max() < 1e-9 for k in a)
    assert_same(model, fast, inputs)


def test_part_of_a_larger_model():
    class Larger(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision, self.inputs = build("fourier")
            self.head = nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head(self.vision(x).logits)

    model = Larger()
    report = pf.accelerate(model, model.inputs["inputs"])
    assert report.check.output_error < 1e-12 and report.check.gradient_error < 1e-9
    assert any(row.name == "vision.perceiver.encoder.cross_attention" for row in report.rows)
    assert not any(row.why and row.why.startswith("put back") for row in report.rows)


def test_pipelines():
    """What pipelines ask of a model: its class, configuration, device and signature."""
    tokenizer = transformers.PerceiverTokenizer(model_max_length=40)
    model, _ = build("sequence", dtype=torch.float32, vocab_size=262, max_position_embeddings=40)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    expected = classify(["five", "more words"], padding="max_length")
    report = pf.accelerate(model)
    actual = classify(["five", "more words"], padding="max_length")
    assert [row["label"] for row in expected] == [row["label"] for row in actual]
    assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(expected, actual))
    assert any(row.way for row in report.rows)
