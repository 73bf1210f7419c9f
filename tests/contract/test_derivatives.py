"""Derivatives of every order and torch.func of whole models, on default settings, beside perceiver-pytorch in float64."""

import pytest
import torch
from contract_cases import MODELS, inputs, modules_of, pair
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from perceiver_fast import reference

NAMES = [name for name in MODELS if name != "lm"]  # whose inputs are ids


@pytest.fixture(autouse=True)
def positions_in_float64():
    """perceiver-pytorch's variants compute positions in the default dtype: float64 makes them exact."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def models(name):
    return [model.eval() for model in pair(name, dtype=torch.float64)]


def first_input(name):
    """The models' inputs, and the name of the one by which outputs are differentiated."""
    call = inputs(name, torch.float64)
    return call, next(key for key, value in call.items() if value.is_floating_point())


def close(values, tolerance=1e-9):
    a, b = ([v] if torch.is_tensor(v) else list(v) for v in values)
    scale = max(t.abs().max().item() for t in a)
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape and (x - y).abs().max() <= tolerance * max(scale, 1.0)


def of_input(model, call, key):
    return lambda x: model(**call | {key: x})


@pytest.mark.parametrize("name", NAMES)
def test_hessian_vector_products(name):
    call, key = first_input(name)
    direction = torch.randn_like(call[key])
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        results = []
        for model in models(name):
            loss = of_input(model, call, key)
            results.append(function(lambda x: loss(x).square().sum(), call[key], direction)[1])
        close(results)
    close([torch.autograd.functional.jvp(of_input(m, call, key), call[key], direction)[1] for m in models(name)])


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_by_all_parameters(name):
    """The second derivative of a gradient penalty, as in WGAN-GP and MAML."""
    results = []
    for model in models(name):
        parameters = [p for _, p in sorted(model.named_parameters())]
        out = model(**inputs(name, torch.float64))
        first = torch.autograd.grad(out.square().mean(), parameters, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(penalty, parameters, allow_unused=True)
        results.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, second)])
    close(results, 1e-8)


@pytest.mark.parametrize("name", ["perceiver", "io", "gated"])
def test_third_derivatives(name, monkeypatch):
    """Third derivatives. torch's layer_norm, which perceiver-pytorch and our head call, has wrong ones: it is replaced."""
    monkeypatch.setattr(torch.nn.functional, "layer_norm", reference.smooth_layer_norm)
    call, key = first_input(name)
    results = []
    for model in models(name):
        x = call[key].clone().requires_grad_()
        value = of_input(model, call, key)(x).sin().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * gradient.detach().cos()).sum()
        results.append(gradient.detach())
    close(results, 1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms_by_the_input(name):
    call, key = first_input(name)
    direction = torch.randn_like(call[key])
    results = []
    for model in models(name):
        function = of_input(model, call, key)
        out, pullback = vjp(function, call[key])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(call[key], direction)
            tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
        forward = jvp(function, (call[key],), (direction,))[1]
        loss = lambda x, f=function: f(x).square().sum()  # noqa: E731
        along = jvp(grad(loss), (call[key],), (direction,))[1]
        results.append([out, pullback(torch.ones_like(out))[0], tangent, forward, along])
    close(results)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gated"])  # vmap knows no nn.GRUCell
def test_gradients_of_each_sample(name):
    results = []
    for model in models(name):
        call = inputs(name, torch.float64)
        parameters = dict(model.named_parameters())

        def loss(parameters, sample, model=model):
            return functional_call(model, parameters, kwargs={k: v[None] for k, v in sample.items()}).square().sum()

        found = vmap(grad(loss), (None, 0))(parameters, call)
        alone = [grad(loss)(parameters, {k: v[i] for k, v in call.items()}) for i in range(2)]
        for key, value in found.items():
            close([value, torch.stack([one[key] for one in alone])])
        results.append([found[key] for key in sorted(found)])
    close(results)


@pytest.mark.parametrize("name", ["perceiver", "io", "block"])
def test_ensembles(name):
    """Several models at once, their weights stacked."""
    results = []
    for index in (0, 1):
        several = [models(name)[index] for _ in range(3)]
        for number, model in enumerate(several):
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 0.1 * number)
        parameters, buffers = stack_module_state(several)
        call = inputs(name, torch.float64)
        found = vmap(lambda p, b: functional_call(several[0], (p, b), kwargs=call))(parameters, buffers)
        close([found, torch.stack([model(**call) for model in several])])
        results.append(found.detach())
    close(results)


def test_a_whole_hessian():
    """Of a small model by its queries, forward over reverse and reverse over reverse."""
    results = []
    for model in models("io"):
        call = inputs("io", torch.float64)
        queries = call["queries"][:1, :2]
        one = {key: value[:1] for key, value in call.items()}
        loss = lambda q, m=model, one=one: m(**one | {"queries": q}).square().sum()  # noqa: E731
        results.append(
            [hessian(loss)(queries), jacrev(jacrev(loss))(queries), torch.autograd.functional.hessian(loss, queries)]
        )
        close([results[-1][0], results[-1][1]])
    close(results)


@pytest.mark.parametrize("name", ["perceiver", "perceiver dense", "io", "experimental"])
def test_gradgradcheck(name):
    _, ours = models(name)
    call, key = first_input(name)
    call = {k: v[:1] for k, v in call.items()}
    assert torch.autograd.gradgradcheck(
        lambda x: of_input(ours, call, key)(x).sum(-1).sum(-1), call[key].requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_with_a_hook_and_with_autograds_own_switches(name):
    """Derivatives are the same where layers are called one by one, and with torch's plain attention."""
    call, key = first_input(name)
    direction = torch.randn_like(call[key])
    ours = models(name)[1]
    loss = of_input(ours, call, key)
    expected = torch.autograd.functional.hvp(lambda x: loss(x).square().sum(), call[key], direction)[1]
    with sdpa_kernel(SDPBackend.MATH):
        close([torch.autograd.functional.hvp(lambda x: loss(x).square().sum(), call[key], direction)[1], expected])
    where = modules_of(name, torch.nn.Linear)[0]
    handle = ours.get_submodule(where).register_forward_hook(lambda *a: None)
    close([torch.autograd.functional.hvp(lambda x: loss(x).square().sum(), call[key], direction)[1], expected])
    handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_refused(name):
    """A second backward without retain_graph raises, as everywhere in PyTorch."""
    ours = models(name)[1]
    loss = ours(**inputs(name, torch.float64)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
