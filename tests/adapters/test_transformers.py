"""Accelerated models of transformers against the same models as they are: outputs and every gradient, in float64."""

import copy

import pytest
import torch
from adapters.perceivers import NAMES, build, perceiver, text
from support import needs_extension

import perceiver_fast as pf
from perceiver_fast.adapters import described, hugging_face_model
from perceiver_fast.adapters.check import run, tensors_of
from perceiver_fast.adapters.forwards import all_stand_ins


def pair(*args, **kwargs):
    """A model as it is, an accelerated copy, and their input."""
    model, inputs = build(*args, **kwargs)
    fast = copy.deepcopy(model)
    assert pf.accelerate(fast)
    return model, fast, inputs


def assert_same(model, fast, inputs, gradients=True):
    expected, actual = run(model, (), inputs, gradients), run(fast, (), inputs, gradients)
    assert len(expected.outputs) == len(actual.outputs) > 0
    for a, b in zip(expected.outputs, actual.outputs):
        assert a.shape == b.shape and (a - b).abs().max() <= 1e-9 * a.abs().max(), (a - b).abs().max()
    assert expected.gradients.keys() == actual.gradients.keys()
    most = max((float(g.abs().max()) for g in expected.gradients.values()), default=0)
    for name, a in expected.gradients.items():
        difference = (a - actual.gradients[name]).abs().max()
        assert difference <= 1e-9 * a.abs().max() + 1e-12 * most, (name, difference)


def ways(model):
    return {f"{name}.{s.method}": s.way for name, s in all_stand_ins(model) if s.way is not None}


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name, batch):
    model, fast, inputs = pair(name, batch)
    assert_same(model, fast, inputs)
    assert_same(model, fast, inputs, gradients=False)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("fourier", dict(cross_attention_shape_for_attention="q", num_cross_attention_heads=4)),
        ("fourier", dict(qk_channels=12, v_channels=16, num_cross_attention_heads=2, use_query_residual=False)),
        ("flow", dict(cross_attention_widening_factor=3, self_attention_widening_factor=2, hidden_act="relu")),
        ("conv", dict(num_latents=1, num_blocks=1)),
        ("multimodal", dict(cross_attention_shape_for_attention="q", num_cross_attention_heads=4)),
        ("masked lm", dict(chunk_size_feed_forward=1)),
    ],
)  # fmt: skip
def test_configurations(name, changes):
    model, fast, inputs = pair(name, **changes)
    if name == "multimodal":  # its decoder's 18 channels would not divide by heads
        fast.perceiver.encoder.config.num_cross_attention_heads = 4
    assert_same(model, fast, inputs)
    if changes.get("chunk_size_feed_forward"):
        assert "its feed-forward runs in chunks" in {row.why for row in pf.accelerate(fast).rows}


def test_training_mode():
    for name in ("conv", "multimodal", "masked lm"):
        model, fast, inputs = pair(name)
        assert_same(model.train(), fast.train(), inputs)
        for a, b in zip(model.buffers(), fast.buffers()):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(**needs_extension)
def test_ways():
    """Grids are described, their tokens never built; queries that are tokens, too; dense tokens are streamed."""
    for name, expected in (("fourier", "grid: grid_attention on cpu"), ("flow", "grid: grid_attention on cpu")):
        _, fast, inputs = pair(name)
        fast(**inputs)
        assert ways(fast)["perceiver.encoder.cross_attention.forward"] == expected
    assert ways(fast)["perceiver.decoder.decoder.decoding_cross_attention.forward"].startswith("described queries")
    _, fast, inputs = pair("multimodal")
    fast(**inputs)
    assert ways(fast)["perceiver.encoder.cross_attention.forward"].startswith("groups: ")


@pytest.mark.skipif(**needs_extension)
def test_tokens_are_never_built(monkeypatch):
    _, fast, inputs = pair("flow")
    with torch.no_grad():
        monkeypatch.setattr(described.TokenSource, "build", lambda self: pytest.fail("tokens were built"))
        fast(**inputs)


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float64])
def test_masks(dtype):
    model, fast, inputs = pair("masked lm", 3)
    mask = inputs["attention_mask"].to(dtype)
    assert_same(model, fast, inputs | dict(attention_mask=mask))
    mask[1] = 0  # an element without any token attends to all
    assert_same(model, fast, inputs | dict(attention_mask=mask))
    assert_same(model, fast, text(3, masked=False))


def test_a_mask_that_is_prepared():
    model, fast, inputs = pair("masked lm", 2)
    soft = torch.randn(2, 1, 1, 12, dtype=torch.float64)
    assert_same(model, fast, inputs | dict(attention_mask=soft))
    assert "a mask is not of zeros and least numbers" in {row.why for row in pf.accelerate(fast).rows}
    each = torch.zeros(2, 1, 5, 12, dtype=torch.float64)
    each[:, :, 2, 3:] = torch.finfo(torch.float64).min
    assert_same(model, fast, inputs | dict(attention_mask=each))
    assert "a mask differs from query to query" in {row.why for row in pf.accelerate(fast).rows}


def test_asking_for_attention_weights():
    model, fast, inputs = pair("fourier")
    asked = inputs | dict(output_attentions=True, output_hidden_states=True)
    expected, actual = model(**asked), fast(**asked)
    assert len(actual.attentions) == 4 and len(actual.cross_attentions) == 2 and len(actual.hidden_states) == 6
    for a, b in zip(tensors_of(expected), tensors_of(actual), strict=True):
        assert (a - b).abs().max() < 1e-12
    assert "attention weights are asked for" in {row.why for row in pf.accelerate(fast).rows}
    assert_same(model, fast, inputs | dict(output_hidden_states=True))
    assert_same(model, fast, inputs | dict(return_dict=False))


def test_pixel_values_and_interpolated_positions():
    model, fast, inputs = pair("learned")
    assert_same(model, fast, dict(pixel_values=inputs["inputs"]))
    larger = torch.randn(2, 3, 10, 12, dtype=torch.float64)
    assert_same(model, fast, dict(inputs=larger, interpolate_pos_encoding=True))


@pytest.mark.parametrize("name", ["flow", "multimodal", "masked lm"])
def test_queries_some_at_a_time(name, monkeypatch):
    """In inference decoders divide their queries; a modality's output is computed where it is used."""
    monkeypatch.setattr(hugging_face_model, "ROWS", 5)
    monkeypatch.setattr(described, "ROWS", 5)
    monkeypatch.setattr(described.by_rows, "__defaults__", (5,))
    monkeypatch.setattr(hugging_face_model, "LARGE", 1)
    model, fast, inputs = pair(name, 2)
    assert_same(model, fast, inputs, gradients=False)
    found = {way for way in ways(fast).values()}
    assert found & {"queries some at a time", "described queries, some at a time"}
    if name == "multimodal":
        assert "queries are built some at a time" in found
        some = dict(image=torch.randperm(128)[:31], audio=torch.arange(8), label=None)
        assert_same(model, fast, inputs | dict(subsampled_output_points=some), gradients=False)
    assert_same(model, fast, inputs)


def test_attention_dropout_keeps_its_expectation():
    model, fast, inputs = pair("fourier", attention_probs_dropout_prob=0.3)
    assert_same(model, fast, inputs)  # evaluation
    fast.train()
    torch.manual_seed(0)
    first = fast(**inputs).logits
    assert not torch.equal(first, fast(**inputs).logits)
    torch.manual_seed(0)
    assert torch.equal(first, fast(**inputs).logits)


@pytest.mark.parametrize(
    "name, dtype", [("fourier", torch.float32), ("flow", torch.float32), ("fourier", torch.bfloat16)]
)
def test_error_of_lower_precision(name, dtype):
    """Of outputs and of all gradients, at most twice the error of the model as it is, over some draws."""
    errors = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}
    for seed in range(4):
        model, inputs = build(name, 2, seed=seed, num_latents=16)
        model, inputs = model.to(dtype), {key: value.to(dtype) for key, value in inputs.items()}
        exact = run(copy.deepcopy(model).double(), (), {key: value.double() for key, value in inputs.items()}, True)
        fast = copy.deepcopy(model)
        pf.accelerate(fast)
        for side, one in (("theirs", model), ("ours", fast)):
            found = run(one, (), inputs, True)
            difference = found.outputs[0].double() - exact.outputs[0]
            errors[side][0] += float(difference.norm() / exact.outputs[0].norm())
            for key, gradient in exact.gradients.items():
                if not key.endswith("key.bias"):  # zero, but for rounding
                    errors[side][1] += float((found.gradients[key].double() - gradient).norm() / gradient.norm())
    for ours, theirs in zip(errors["ours"], errors["theirs"]):
        assert 0 < ours <= 2 * theirs


def test_autocast_runs_as_it_is():
    model, fast, inputs = pair("fourier", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(**inputs).logits, fast(**inputs).logits)
    assert "autocast decides the dtype of every operator" in {row.why for row in pf.accelerate(fast).rows}


def test_compile():
    """Tokens are built then; a graph's outputs and gradients are the model's."""
    torch._dynamo.reset()
    model, fast, inputs = pair("fourier", num_blocks=1, num_self_attends_per_block=1)
    compiled = torch.compile(fast, backend="eager")
    a, b = run(model, (), inputs, True), run(compiled, (), inputs, True)
    assert (a.outputs[0] - b.outputs[0]).abs().max() < 1e-9
    for key, gradient in a.gradients.items():
        assert (gradient - b.gradients[f"_orig_mod.{key}"]).abs().max() < 1e-9 * gradient.abs().max() + 1e-9


def test_second_derivatives():
    model, fast, inputs = pair("fourier", 1)
    found = []
    for one in (model, fast):
        x = inputs["inputs"].clone().requires_grad_()
        (grad,) = torch.autograd.grad(one(x).logits.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert (found[0] - found[1]).abs().max() < 1e-9 * found[0].abs().max()


def test_gradients_of_inputs():
    for name in ("fourier", "conv", "flow", "learned"):
        model, fast, inputs = pair(name)
        found = []
        for one in (model, fast):
            x = inputs["inputs"].clone().requires_grad_()
            (one(x).logits ** 2).sum().backward()
            found.append(x.grad)
        assert (found[0] - found[1]).abs().max() < 1e-9 * found[0].abs().max()


def test_preprocessors_alone_return_tensors():
    _, fast, inputs = pair("fourier")
    tokens, _, _ = fast.perceiver.input_preprocessor(inputs["inputs"])
    assert type(tokens) is torch.Tensor


def test_codes_are_transformers_own():
    """Codes of lines along axes say the codes of a grid, to the last bit."""
    for sizes, options in (((24, 36), {}), ((3, 7, 5), dict(sine_only=True)), ((40,), {})):
        encoding = perceiver.PerceiverFourierPositionEncoding(6, tuple(s + 2 for s in sizes), **options)
        tokens = hugging_face_model.grid_tokens(encoding, torch.zeros(1, *sizes, 1, dtype=torch.float64))
        expected = encoding(sizes, 1, device=torch.device("cpu"), dtype=torch.float64)
        assert torch.equal(tokens.materialize()[..., 1:], expected)
