"""Layers that stand in several places: one op adds up the gradients of all their uses, whatever is asked for."""

import pytest
import torch
from support import needs_extension, relative_error

import perceiver_fast as pf
from perceiver_fast.layers import latent_layers, small
from perceiver_fast.ops.latent_layers import latent_layers_again, latent_layers_unchecked

pytestmark = pytest.mark.skipif(**needs_extension)

SIZES = dict(num_freq_bands=2, depth=4, max_freq=4.0, num_latents=5, latent_dim=16, latent_heads=2, latent_dim_head=4)


def model(**options):
    torch.manual_seed(0)
    return pf.Perceiver(**SIZES | dict(num_classes=3, weight_tie_layers=True) | options)


def image():
    return torch.randn(2, 6, 5, 3, generator=torch.Generator().manual_seed(1))


def one_by_one(monkeypatch):
    """autograd adds up the gradients."""
    monkeypatch.setattr(latent_layers, "uses", lambda: None)


@pytest.fixture
def returned(monkeypatch):
    """How many uses returned their parameters."""
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[1]))
        return latent_layers_again(*arguments)

    monkeypatch.setattr(latent_layers, "latent_layers_again", counted)
    return calls


@pytest.mark.parametrize("options", [{}, dict(self_per_cross_attn=2, depth=5), dict(ff_dropout=0.3, attn_dropout=0.2)])
def test_gradients_are_those_that_autograd_adds_up(options, returned, monkeypatch):
    perceiver, data = model(**options).double(), image().double()

    def results():
        torch.manual_seed(3)
        out = perceiver(data)
        return [out, *torch.autograd.grad(out.square().sum(), perceiver.parameters())]

    found = results()
    assert len(returned) == options.get("depth", 4) - 2  # the first block is another, the last one's are used no more
    one_by_one(monkeypatch)
    for mine, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_the_whole_of_perceiver_io_s_blocks(returned, monkeypatch):
    torch.manual_seed(0)
    io = pf.PerceiverIO(depth=3, dim=9, queries_dim=6, num_latents=8, latent_dim=16, weight_tie_layers=True).double()
    data, queries = torch.randn(2, 9, 9).double(), torch.randn(5, 6).double()

    def results():
        return torch.autograd.grad(io(data, queries=queries).square().sum(), io.parameters())

    found = results()
    assert len(returned) == 2
    one_by_one(monkeypatch)
    for mine, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_no_operator_of_torch_s_adds_up_large_gradients():
    perceiver, data = model(latent_dim=64, latent_dim_head=64), image()
    perceiver(data).sum().backward()
    perceiver.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        perceiver(data).sum().backward()
    sizes = [torch.Size(event.input_shapes[0]).numel() for event in profile.events() if event.name == "aten::add_"]
    assert max(sizes, default=0) < 32_768


def test_a_part_of_the_graph():
    """Outputs of earlier blocks, which later uses have no say in; and a graph that is walked twice."""
    perceiver, data = model().double(), image().double()
    weight = perceiver.layers[1].cross_ff.fn.net[0].weight
    _, hiddens = perceiver(data, return_hiddens=True)
    found = [torch.autograd.grad(h.square().sum(), weight, retain_graph=True, allow_unused=True)[0] for h in hiddens]
    again = [torch.autograd.grad(h.square().sum(), weight, retain_graph=True, allow_unused=True)[0] for h in hiddens]
    assert found[0] is None and found[1] is None  # the initial latents, and the block of other weights
    for depth, mine, twice in zip(range(2, 5), found[2:], again[2:]):
        shallow = model(depth=depth).double()
        shallow.load_state_dict({k: v for k, v in perceiver.state_dict().items() if k in shallow.state_dict()})
        _, theirs = shallow(data, return_hiddens=True)
        (want,) = torch.autograd.grad(theirs[-1].square().sum(), shallow.layers[1].cross_ff.fn.net[0].weight)
        assert torch.equal(mine, twice) and relative_error(mine, want) < 1e-12


def test_some_parameters_learn_and_hooks_see_the_sum():
    perceiver, data = model().double(), image().double()
    expected = dict(zip(perceiver.state_dict(), torch.autograd.grad(perceiver(data).sum(), perceiver.parameters())))
    net = perceiver.layers[1].cross_ff.fn.net
    for parameter in perceiver.parameters():
        parameter.requires_grad_(parameter is net[0].weight)
    seen = []
    net[0].weight.register_hook(lambda grad: seen.append(grad.clone()))
    perceiver(data).sum().backward()
    (name,) = [n for n, p in perceiver.named_parameters() if p is net[0].weight]
    assert len(seen) == 1 and relative_error(seen[0], expected[name]) < 1e-12
    assert relative_error(net[0].weight.grad, expected[name]) < 1e-12
    assert all(p.grad is None for p in perceiver.parameters() if p is not net[0].weight)


def test_second_derivatives(monkeypatch):
    perceiver, data = model(depth=3).double(), image().double()

    def second():
        grads = torch.autograd.grad(perceiver(data).square().sum(), perceiver.parameters(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), perceiver.parameters())

    found = second()
    one_by_one(monkeypatch)
    for mine, theirs in zip(found, second(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("how", ["checkpoint", "autocast", "bfloat16 weights", "a hook", "layer by layer"])
def test_other_ways_to_run(how, monkeypatch):
    perceiver, data = model(checkpoint=how == "checkpoint"), image()
    if how == "bfloat16 weights":
        perceiver, data = perceiver.bfloat16(), data.bfloat16()
    if how == "a hook":  # the second use of the block is called with it, the others not
        calls = []
        perceiver.layers[1].cross_ff.register_forward_hook(lambda *_: calls.append(1))
    if how == "layer by layer":
        monkeypatch.setattr(small, "are_few", lambda latents, channels: False)
    exact = model().double()
    exact.load_state_dict(perceiver.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = perceiver(data)
    found = torch.autograd.grad(out.double().square().sum(), perceiver.parameters())
    want = torch.autograd.grad(exact(data.double()).square().sum(), exact.parameters())
    for mine, true in zip(found, want, strict=True):
        assert relative_error(mine, true) < (1e-5 if how not in ("autocast", "bfloat16 weights") else 0.1)


def test_models_within_models_have_uses_of_their_own():
    """A block that runs a model of its own leaves the outer one's uses alone."""
    outer, inner, data = model().double(), model(depth=3).double(), image().double()
    want = torch.autograd.grad(outer(data).sum(), outer.parameters())
    calls = []

    class Asks(torch.nn.Module):
        def forward(self, x, **keywords):
            calls.append(inner(data).detach())
            return block(x, **keywords)

    block = outer.layers[2]
    outer.layers[2] = Asks()
    found = torch.autograd.grad(outer(data).sum(), [p for p in outer.parameters()])
    assert calls
    named = {id(p): g for p, g in zip(outer.parameters(), found)}
    assert all(relative_error(named[id(p)], g) < 1e-12 for p, g in zip(outer.parameters(), want))


def test_the_op_by_itself():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    parameters = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((8,), (8,), (12, 8), (24, 8), (8, 12), (8,))
    ]
    options = [3], [0.5], [1e-5]
    y, returned = latent_layers_again(x, parameters, *options)
    assert all(torch.equal(a, b) and a.data_ptr() == b.data_ptr() for a, b in zip(parameters, returned))
    z = latent_layers_unchecked(y, returned, *options)
    want = latent_layers_unchecked(latent_layers_unchecked(x, parameters, *options), parameters, *options)
    assert torch.equal(z, want)
    found = torch.autograd.grad(z.square().sum(), parameters, retain_graph=True)
    for mine, theirs in zip(found, torch.autograd.grad(want.square().sum(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    (only,) = torch.autograd.grad(returned[0].sum(), parameters[0])  # nothing but the parameters is used again
    assert torch.equal(only, torch.ones_like(only))
    with torch.no_grad():
        assert latent_layers_again(x, parameters, *options)[1] is parameters


@pytest.mark.parametrize("place", ["block", "inside"])
def test_parameters_that_change_between_places(place, monkeypatch):
    """Other memory, as offloading gives them, and a part of the places that learns."""
    perceiver, data = model().double(), image().double()
    block = perceiver.layers[1]
    module = block if place == "block" else block.cross_attn
    calls = []

    def shrink(*_):
        calls.append(1)
        for parameter in block.parameters():
            parameter.data = parameter.data * 0.7

    def freeze(*_):
        calls.append(1)
        block.requires_grad_(len(calls) > 1)

    state = {name: p.clone() for name, p in perceiver.state_dict().items()}
    for change in (shrink, freeze):
        found = []
        for alone in (False, True):
            perceiver.load_state_dict(state)
            calls.clear()
            with monkeypatch.context() as patch:
                if alone:
                    one_by_one(patch)
                hook = module.register_forward_pre_hook(change)
                out = perceiver(data)
                hook.remove()
            perceiver.requires_grad_()
            found.append([out, *torch.autograd.grad(out.sum(), perceiver.parameters(), allow_unused=True)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("order", [1, -1])
def test_latents_that_a_hook_detaches(order):
    """Graphs of several places that have nothing in common but parameters are walked one after the other."""
    perceiver, data = model().double(), image().double()
    outs = []
    perceiver.layers[1].register_forward_hook(lambda module, given, out: (outs.append(out), out.detach())[1])
    perceiver(data)
    for out in outs[::order]:
        out.square().mean().backward()
    summed = perceiver.layers[1].cross_ff.fn.net[0].weight.grad.clone()
    perceiver.zero_grad()
    outs.clear()
    perceiver(data)
    sum(out.square().mean() for out in outs).backward()
    assert relative_error(summed, perceiver.layers[1].cross_ff.fn.net[0].weight.grad) < 1e-12


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        perceiver = model().requires_grad_(False)
    assert perceiver(image()).isfinite().all()
