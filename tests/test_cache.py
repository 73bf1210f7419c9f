"""What is cached between inference calls is never used after a parameter changed."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from support import relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.cache import Cached, ParameterCache
from perceiver_fast.ops import linear_libraries

GRID = dict(num_freq_bands=3, depth=2, max_freq=8.0, num_latents=16, latent_dim=32, num_classes=7)


def build(seed=0, **arguments):
    torch.manual_seed(seed)
    return pf.Perceiver(**GRID | arguments).eval()


def data(size=9):
    return torch.randn(2, size, size, 3, generator=torch.Generator().manual_seed(1))


def expected(model, x):
    """The output of a copy of ``model`` that has cached nothing, and caches nothing, as gradients are on."""
    with torch.enable_grad():
        return copy.deepcopy(model)(x).detach()


@pytest.fixture(params=["mkl", "onednn", "torch"], autouse=True)
def library(request, monkeypatch):
    """Libraries pack weights, each its own way; "torch" packs none, but products of parameters are cached with it, too."""
    monkeypatch.setattr(importlib.import_module("perceiver_fast.ops.linear"), "LARGE", 1)  # small models pack, too
    if linear_libraries.reasons(request.param):
        pytest.skip(f"{request.param}: {linear_libraries.reasons(request.param)}")
    with pf.use_linear(request.param):
        yield request.param


@pytest.fixture
def warm(library):
    """A model that has run often enough in inference to have cached all it ever will, and its input."""
    model, x = build(), data()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                model(x)
    cached = [name for m in model.modules() if isinstance(m, Cached) for name in m.cache._entries]
    assert {"basis", "latents", "queries"} <= set(cached)
    assert ("weight1" in cached and "to_kv" in cached) == (library != "torch")
    return model, x


def check(model, x, changed=True, before=None):
    with torch.no_grad():
        got = model(x)
        again = model(x)
        third = model(x)  # packed anew by now
    want = expected(model, x)
    for out in (got, again, third):
        assert relative_error(out, want) < 1e-5
    if before is not None:
        assert (relative_error(want, before) > 1e-3) == changed


def every_kind(model):
    """Parameters whose products are cached, one of each kind."""
    block = model.layers[0]
    attn, ff = block.self_attns[0][0].fn, block.cross_ff.fn.net
    cross = block.cross_attn
    return {
        "latents": model.latents,
        "norm": cross.norm.weight,
        "norm_context": cross.norm_context.bias,
        "cross to_q": cross.fn.to_q.weight,
        "cross to_kv": cross.fn.to_kv.weight,
        "to_kv": attn.to_kv.weight,
        "to_out": attn.to_out.weight,
        "weight1": ff[0].weight,
        "bias1": ff[0].bias,
        "weight2": ff[2].weight,
    }


@pytest.mark.parametrize("name", list(every_kind(build())))
@pytest.mark.parametrize("write", ["in place", "data", "numpy", "swapped data"])
def test_a_written_parameter_is_seen(warm, name, write):
    model, x = warm
    parameter, before = every_kind(model)[name], expected(model, x)
    with torch.no_grad():
        model(x)
        model(x)
        noise = torch.randn_like(parameter)
        if write == "in place":
            parameter.add_(noise)
        elif write == "data":
            parameter.data.add_(noise)
        elif write == "numpy":
            parameter.detach().numpy()[...] += noise.numpy()
        else:
            parameter.data = parameter.data + noise
    check(model, x, True, before)


def test_one_element_written_in_place_is_seen(warm):
    model, x = warm
    before = expected(model, x)
    with torch.no_grad():
        model(x), model(x)
        model.layers[1].self_attns[0][1].fn.net[2].weight[3, 5] = 1e4
    check(model, x, True, before)


def test_a_replaced_parameter_is_seen(warm):
    """DistributedDataParallel and FSDP make parameters views of one buffer; torch.func.functional_call replaces them."""
    model, x = warm
    before = expected(model, x)
    flat = torch.randn(sum(p.numel() for p in model.parameters())) * 0.1
    with torch.no_grad():
        model(x), model(x)
        start = 0
        for parameter in model.parameters():  # all move into one buffer, which is then changed by one operation
            view = flat[start : start + parameter.numel()].view_as(parameter)
            view.copy_(parameter)
            parameter.data = view
            start += parameter.numel()
        check(model, x, False, before)
        flat.mul_(1.5)
    check(model, x, True, before)
    net = model.layers[0].cross_ff.fn.net
    net[0].weight = nn.Parameter(torch.randn_like(net[0].weight))
    check(model, x)
    swapped = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(model, swapped, (x,))
    other = build()
    other.load_state_dict(swapped)
    assert relative_error(out, expected(other, x)) < 1e-5
    check(model, x)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_an_optimizer_step_is_seen(warm, make):
    model, x = warm
    optimizer, before = make(model.parameters(), lr=0.1), expected(model, x)
    model(x).square().sum().backward()
    with torch.no_grad():
        model(x), model(x)
    optimizer.step()
    check(model, x, True, before)


def test_load_state_dict_is_seen(warm):
    model, x = warm
    before = expected(model, x)
    other = build(seed=5)
    model.load_state_dict(other.state_dict())
    check(model, x, True, before)
    assert relative_error(expected(model, x), expected(other, x)) < 1e-6
    model.load_state_dict(build(seed=6).state_dict(), assign=True)
    check(model, x)


def test_another_dtype_forgets(warm):
    model, x = warm
    model.double()
    assert not any(m.cache._entries for m in model.modules() if isinstance(m, Cached))
    with torch.no_grad():
        out = model(x.double())
        assert relative_error(model(x.double()), out) < 1e-14
    assert relative_error(out, expected(model, x.double())) < 1e-12
    model.float()
    check(model, x)
    model.bfloat16()
    with torch.no_grad():
        first, second, third = (model(x.bfloat16()) for _ in range(3))
    assert relative_error(third.float(), first.float()) < 0.05 and relative_error(second.float(), first.float()) < 0.05


def test_copies_keep_their_own(warm):
    model, x = warm
    before = expected(model, x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    assert len(pickle.dumps(model)) < 1.1 * 4 * sum(p.numel() for p in model.parameters()) + 2e5
    for twin in twins:
        assert not any(m.cache._entries for m in twin.modules() if isinstance(m, Cached))
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
        check(twin, x, True, before)
    check(model, x, False, before)


def test_state_dict_and_training_do_not_know(warm):
    model, x = warm
    assert set(model.state_dict()) == set(build().state_dict())
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not any(m.cache._entries for m in model.modules() if isinstance(m, Cached))


def test_other_inputs_and_batches(warm):
    model, _ = warm
    with torch.no_grad():
        for size in (9, 5, 9, 12, 12, 5):
            x = data(size)
            assert relative_error(model(x), expected(model, x)) < 1e-5
            assert relative_error(model(x[:1]), expected(model, x[:1])) < 1e-5


def test_under_autocast(warm):
    model, x = warm
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outs = [model(x) for _ in range(3)]
        model.latents.mul_(2.0)
        changed = model(x)
    assert all(relative_error(out, outs[0]) < 0.05 for out in outs)
    assert relative_error(changed, outs[0]) > 0
    check(model, x)


def test_explain_and_transforms_leave_nothing(warm):
    model, x = warm
    pf.clear_caches(model)
    pf.explain(model, x)
    assert not any(m.cache._entries for m in model.modules() if isinstance(m, Cached))
    check(model, x)
    with pf.use_backend("reference"), torch.no_grad():
        parameters = dict(model.named_parameters())
        stacked = {name: torch.stack([p, p * 1.1]) for name, p in parameters.items()}
        many = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
        assert relative_error(many[0], expected(model, x)) < 1e-5
    check(model, x)


def test_a_trace_holds_no_cached_values(library):
    model, x = pf.PerceiverIO(dim=9, queries_dim=6, logits_dim=5, num_latents=6, latent_dim=16, depth=1).eval(), data()
    x = x.flatten(1, 2).repeat(1, 1, 3)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        traced = torch.jit.trace(model, (x,))
        for parameter in model.parameters():  # which are the trace's, too
            parameter.mul_(1.1)
        assert relative_error(traced(x), expected(model, x)) < 1e-5


def test_the_cache_itself():
    cache, weight, calls = ParameterCache(), nn.Parameter(torch.ones(3)), []

    def build_value():
        calls.append(1)
        return weight.detach() * 2

    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(cache.get("a", (weight,), build_value), torch.full((3,), 2.0))
        assert len(calls) == 1
        cache.get("a", (weight,), build_value, cache_key=1)
        assert len(calls) == 2
    with torch.inference_mode():
        value = cache.get("a", (weight,), build_value, cache_key=1)
        assert len(calls) == 2 and not value.is_inference()
        cache.get("b", (torch.ones(3),), build_value)  # torch counts no versions of inference tensors
        assert len(calls) == 3 and "b" not in cache._entries
    cache.get("a", (weight,), build_value, cache_key=1)
    assert len(calls) == 4 and not cache._entries


def test_content_hash():
    from perceiver_fast import extension

    def content(t):
        return extension.module.content_hash(t.data_ptr(), t.numel() * t.element_size())

    for size in (0, 1, 7, 100, 2048):  # up to 8 KiB every bit counts
        t = torch.randn(size)
        seen = {content(t)}
        for i in range(size):
            t[i] = -t[i]
            seen.add(content(t))
            t[i] = -t[i]
        assert len(seen) == size + 1
    big = torch.randn(300, 1000)
    before = content(big)
    assert content(big * 1.0001) != before and content(big.clone()) == before
    assert content(torch.zeros(8)) != content(torch.zeros(16))
