"""LayerNorm and a linear layer as one op: which rows it is for, its numbers, and all that runs through it."""

import pytest
import torch
import torch.nn.functional as F
from support import check_over_draws, needs_extension, relative_error
from torch.autograd import gradcheck, gradgradcheck

import perceiver_fast as pf
from perceiver_fast.layers import Attention, PreNorm
from perceiver_fast.ops.layer_norm_linear import (
    FewRowsFunction,
    LayerNormLinearFunction,
    is_for,
    layer_norm_linear_unchecked,
)
from perceiver_fast.tokens import DenseTokens, dense

pytestmark = pytest.mark.skipif(**needs_extension)

NAMES = ("out", "x", "gain", "shift", "weight")
TOKENS, CHANNELS, WIDTH = 600, 256, 256  # 2^25 multiply-adds


def plain(x, gain, shift, weight, eps):
    return F.linear(F.layer_norm(x, x.shape[-1:], gain, shift, eps), weight)


def run(function, inputs, d_out, frozen, dtype=torch.float32):
    """The result and all gradients, by name."""
    leaves = [t.to(dtype).requires_grad_(name != "x" or not frozen) for name, t in zip(NAMES[1:], inputs)]
    out = function(*leaves, 1e-5)
    learning = {name: leaf for name, leaf in zip(NAMES[1:], leaves) if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(learning.values()), d_out.to(dtype))
    return dict(zip(("out", *learning), (out.detach(), *grads)))


@pytest.mark.parametrize(
    "rows, channels, out_channels, taken",
    [
        (2048, 768, 2560, True),  # language
        (16_384, 768, 2560, True),  # more rows of a weight beyond the cache
        (512, 1024, 1024, True),  # latents in a decoder
        (50_176, 512, 128, False),  # many rows and a weight that stays in the cache
        (50_000, 8192, 256, False),  # the normalised rows would be many times the result
        (300, 48, 64, True),  # little work, in kernels of its own
    ],
)
def test_which_rows_it_is_for(rows, channels, out_channels, taken):
    assert is_for(rows, channels, out_channels, torch.float32) == taken
    assert is_for(rows, channels, out_channels, torch.float64) == (rows == 300)  # no library is chosen for it
    assert not is_for(rows, channels, out_channels, torch.bfloat16)


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen rows"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize(
    "rows, channels, out_channels", [(70, 96, 160), (512, 256, 640), (2, 5, 3), (500, 33, 70), (1, 300, 17)]
)
def test_error_is_that_of_plain_pytorch(rows, channels, out_channels, offset, frozen):
    found = []
    for _ in range(4):
        shapes = (2, rows, channels), (channels,), (channels,), (out_channels, channels)
        inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        inputs[0] += offset
        inputs, d_out = [t.float() for t in inputs], torch.randn(2, rows, out_channels)
        exact = run(plain, inputs, d_out, frozen, torch.float64)
        ours, theirs = (run(f, inputs, d_out, frozen) for f in (layer_norm_linear_unchecked, plain))
        assert ours.keys() == exact.keys()
        for name, value in exact.items():
            assert ours[name].dtype == torch.float32 and ours[name].shape == value.shape, name
            found.append((name, relative_error(ours[name], value), relative_error(theirs[name], value)))
    check_over_draws(found, 1e-7)


@pytest.mark.parametrize("op", [LayerNormLinearFunction, FewRowsFunction])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen rows"])
def test_derivatives(frozen, op):
    x, gain, shift, weight = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (3,), (3,), (5, 3)))
    leaves = [x.requires_grad_(not frozen), *(t.requires_grad_() for t in (gain, shift, weight))]

    def function(*leaves):
        return op.apply(*leaves, 1e-5)

    assert gradcheck(function, leaves) and gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 16), (16,), (0, 16), (3, 700, 16)])
def test_the_public_function(shape, dtype, backend):
    x, gain, shift, weight = (torch.randn(s).to(dtype) for s in (shape, (16,), (16,), (700, 16)))
    with pf.use_backend(backend):
        out = pf.ops.layer_norm_linear(x, gain, shift, weight)
    assert out.dtype == dtype and out.shape == (*shape[:-1], 700)
    exact = plain(*(t.double() for t in (x, gain, shift, weight)), 1e-5)
    assert relative_error(out, exact) < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize(
    "place, change, match",
    [
        (0, lambda x: x.int(), "floating point"),
        (0, lambda x: x[..., 1:], "the same channels"),
        (1, lambda gain: gain.double(), "like x"),
        (2, lambda shift: shift[1:], "shift"),
        (3, lambda weight: weight[0], "a weight"),
        (4, lambda eps: 0.0, "eps above 0"),
    ],
)
def test_what_does_not_fit_is_refused(place, change, match):
    arguments = [torch.randn(3, 8), torch.randn(8), torch.randn(8), torch.randn(5, 8), 1e-5]
    arguments[place] = change(arguments[place])
    with pytest.raises((TypeError, ValueError), match=match):
        pf.ops.layer_norm_linear(*arguments)


def test_some_parameters_learn():
    """Whichever do get their gradients, and the others none."""
    x, *parameters = (torch.randn(s) for s in ((7, 16), (16,), (16,), (24, 16)))
    expected = run(plain, (x, *parameters), torch.ones(7, 24), True)
    for name, parameter in zip(NAMES[2:], parameters):
        for other in parameters:
            other.requires_grad_(other is parameter)
        layer_norm_linear_unchecked(x, *parameters, 1e-5).sum().backward()
        assert relative_error(parameter.grad, expected[name]) < 1e-5
        assert all(other.grad is None for other in parameters if other is not parameter)
        parameter.grad = None


@pytest.fixture
def calls(monkeypatch):
    """The shapes of tokens that go through the op."""
    found = []

    def counted(x, *args):
        found.append(tuple(x.shape))
        return layer_norm_linear_unchecked(x, *args)

    monkeypatch.setattr(dense, "layer_norm_linear_unchecked", counted)
    return found


def layer_and_data(dropout=0.0, learns=False):
    torch.manual_seed(0)
    layer = PreNorm(64, Attention(64, CHANNELS, 4, WIDTH // 8, dropout), context_dim=CHANNELS)
    for norm in (layer.norm, layer.norm_context):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    return layer, torch.randn(2, 64, 64), torch.randn(2, TOKENS // 2, CHANNELS).requires_grad_(learns)


def results(layer, x, context, **call):
    """The output and the gradients of all parameters, and of the context where it learns."""
    torch.manual_seed(1)
    out = layer(x, context=context, **call)
    leaves = [*layer.parameters(), *([context] if context.requires_grad else [])]
    return out.detach(), *torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1]).to(out)).sum(), leaves)


@pytest.mark.parametrize("learns", [False, True], ids=["", "tokens learn"])
@pytest.mark.parametrize("call", ["", "masked", "inverted", "dropout"])
def test_a_layer_of_wide_tokens(call, learns, calls):
    """The numbers of the float64 layer, whose tokens take the kernel."""
    layer, x, context = layer_and_data(0.3 if call == "dropout" else 0.0, learns)
    keywords = dict(inverted_attention=True) if call == "inverted" else {}
    if call == "masked":
        keywords["mask"] = torch.rand(context.shape[:2]) > 0.3
    found = results(layer, x, context, **keywords)
    assert calls == [(2, TOKENS // 2, CHANNELS)]
    wide = context.detach().double().requires_grad_(learns)
    exact = results(layer.double(), x.double(), wide, **keywords)
    assert len(calls) == 1  # float64 is none of the library's
    for value, expected in zip(found, exact, strict=True):
        assert (value - expected).norm() < 2e-5 * expected.norm() + 1e-6  # inverted, the latents' shift has no gradient


MODEL = dict(
    num_freq_bands=1, max_freq=4.0, depth=1, num_latents=128, latent_dim=32, num_classes=3, input_axis=1,
    input_channels=CHANNELS, fourier_encode_data=False, cross_heads=2, cross_dim_head=64,
)  # fmt: skip


def test_tokens_in_chunks_and_layers_that_run_again(calls):
    """Every chunk takes the way of its own size; checkpoint=True runs a layer again in the backward."""
    model = pf.Perceiver(**MODEL)
    again = pf.Perceiver(**MODEL, checkpoint=True)
    again.load_state_dict(model.state_dict())
    data = torch.randn(1, 700, CHANNELS)
    found = []
    for called, given in ((model, data), (model, pf.stream(data, rows=400)), (again, data)):
        model.zero_grad()
        out = called(given)
        out.square().sum().backward()
        found.append((out.detach(), *(p.grad.clone() for p in called.parameters())))
    assert [shape[1] for shape in calls] == [700, 400, 300, 400, 300, 700, 700]
    for whole, streamed, checkpointed in zip(*found, strict=True):
        assert relative_error(streamed, whole) < 1e-5 and relative_error(checkpointed, whole) < 1e-5


def test_where_the_kernel_or_torch_runs_instead(calls):
    layer, x, context = layer_and_data()
    expected = layer(x, context=context).detach()
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, context=context)
    with pf.use_backend("reference"):
        assert relative_error(layer(x, context=context), expected) < 1e-5
    mapped = torch.func.vmap(lambda t: layer(x[:1], context=t))(context.unsqueeze(1))
    assert len(calls) == 1
    assert relative_error(mapped[0], layer(x[:1], context=context[:1])) < 1e-5


def test_explain_names_it():
    model, data = pf.Perceiver(**MODEL), torch.randn(1, TOKENS, CHANNELS)
    plan = pf.explain(model, data).layers[0].plan
    assert plan.path == "projected" and [use.op for use in plan.uses] == ["layer_norm", "linear"]
    with pf.use_linear("torch"):
        assert "with linear on torch (torch is forced)" in str(pf.explain(model, data))
    few = DenseTokens(data[:, :50])
    assert [(use.op, use.backend) for use in few.uses("projected", WIDTH)] == [("layer_norm_linear", "cpu")]
    many = DenseTokens(data[:, :, :8].expand(100, -1, -1))
    assert [use.op for use in many.uses("projected", 2048)] == ["layer_norm", "linear"]
    assert [use.op for use in DenseTokens(data.expand(100, -1, -1)).uses("projected", WIDTH)] == ["fourier_projection"]
    assert few.uses("absorbed", WIDTH) == ()
