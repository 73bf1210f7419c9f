"""A parameter that was written to, by any route, counts at the next call: nothing computed from it is kept."""

import copy

import pytest
import torch
from support import relative_error
from torch import nn

import perceiver_fast as pf

GRID = dict(num_freq_bands=3, depth=2, max_freq=8.0, num_latents=16, latent_dim=32, num_classes=7)


def build(seed=0, **arguments):
    torch.manual_seed(seed)
    return pf.Perceiver(**GRID | arguments).eval()


def data(size=9):
    return torch.randn(2, size, size, 3, generator=torch.Generator().manual_seed(1))


def expected(model, x):
    """The output of a copy of ``model`` that was never called before."""
    with torch.no_grad():
        return copy.deepcopy(model)(x)


@pytest.fixture
def warm():
    """A model that has run in inference, and its input."""
    model, x = build(), data()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                model(x)
    return model, x


def changed(model, x, before):
    """The model's output, which is that of a fresh copy, and not what it was before."""
    with torch.inference_mode():
        out = model(x)
    assert torch.equal(out, expected(model, x))
    return relative_error(out, before) > 1e-4


def every_kind(model):
    """Parameters of one kind each."""
    block = model.layers[0]
    attn, ff, cross = block.self_attns[0][0].fn, block.cross_ff.fn.net, block.cross_attn
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


def written(p, part, noise):
    """A copy of ``p`` with ``noise`` added to a part."""
    copied = p.detach().clone()
    copied[part] += noise[part]
    return copied


ROUTES = {
    "in place": lambda p, part, noise: p.__setitem__(part, p[part] + noise[part]),
    "data": lambda p, part, noise: p.data[part].add_(noise[part]),
    "numpy": lambda p, part, noise: p.detach().numpy().__setitem__(part, written(p, part, noise)[part].numpy()),
    "swapped data": lambda p, part, noise: setattr(p, "data", written(p, part, noise)),
    "set_": lambda p, part, noise: p.set_(written(p, part, noise)),
}


@pytest.mark.parametrize("name", list(every_kind(build())))
@pytest.mark.parametrize("route", ROUTES)
def test_a_written_parameter_is_seen(warm, name, route):
    model, x = warm
    parameter, before = every_kind(model)[name], expected(model, x)
    noise = 100 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for part in ((-1,) * parameter.dim(), (..., slice(1, None))):  # one element; all but the first of every row
            ROUTES[route](parameter, part, noise)
            assert changed(model, x, before)
            before = expected(model, x)


def test_pruned_heads_are_seen():
    """Seven of eight heads taken out of a wide layer through ``.data``."""
    model = build(latent_dim=512, latent_heads=8, latent_dim_head=64)
    x = data()
    with torch.no_grad():
        before = model(x)
        for layer in model.layers:
            layer.self_attns[0][0].fn.to_out.weight.data[:, 64:512] = 0
    assert changed(model, x, before)


def test_hooks_that_write_in_place_do_not_add_up(warm):
    model, x = warm

    def double(module, args):
        args[0].mul_(2.0)

    handle = model.layers[0].cross_attn.fn.to_q.register_forward_pre_hook(double)
    with torch.no_grad():
        first = model(x)
        assert all(torch.equal(model(x), first) for _ in range(3))
        handle.remove()
        assert torch.equal(model(x), expected(model, x))


def test_replaced_parameters_are_seen(warm):
    model, x = warm
    before = expected(model, x)
    flat = torch.randn(sum(p.numel() for p in model.parameters())) * 0.1
    with torch.no_grad():
        start = 0
        for parameter in model.parameters():  # all move into one buffer, as DistributedDataParallel moves them
            view = flat[start : start + parameter.numel()].view_as(parameter)
            view.copy_(parameter)
            parameter.data = view
            start += parameter.numel()
        assert not changed(model, x, before)
        flat.mul_(1.5)
    assert changed(model, x, before)
    swapped = {name: torch.randn_like(p) * 0.1 for name, p in model.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(model, swapped, (x,))
    other = build()
    other.load_state_dict(swapped)
    assert torch.equal(out, expected(other, x))
    model.load_state_dict(build(seed=6).state_dict(), assign=True)
    assert changed(model, x, before)


def test_inference_holds_no_memory():
    """No tensor that a forward made outlives it, but for tables of codes, which are no parameters."""
    import gc

    model, x = build(latent_dim=256), data()

    def bytes_alive():
        gc.collect()
        tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))
        # A test of torch.compile before this one may have left tensors of symbolic sizes, which hold no memory.
        return sum(t.nbytes for t in tensors if not t._has_symbolic_sizes_strides)

    with torch.no_grad():
        model(x)
        before = bytes_alive()
        for _ in range(3):
            model(x)
    assert bytes_alive() <= before + 1024
    assert not any(
        isinstance(value, (torch.Tensor, dict)) and name not in NN
        for m in model.modules()
        for name, value in vars(m).items()
    )


NN = set(vars(nn.Module()))


BIASES = ["decoder_cross_attn.fn.to_out", "decoder_ff.fn.net.2", "cross_attend_block.cross_attn.fn.to_out"]


@pytest.mark.parametrize(
    "where", [*BIASES, "cross_attend_block.cross_ff.fn.net.2", "layers.0.self_attns.0.0.fn.to_out"]
)
def test_a_bias_without_memory_is_an_error(where):
    """Also where it is added to the result of a layer that is called by itself, as a decoder's is."""
    model = pf.PerceiverIO(depth=1, dim=9, queries_dim=14, logits_dim=2, num_latents=8, latent_dim=16, decoder_ff=True)
    model.get_submodule(where).bias.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError), torch.no_grad():
        model.eval()(torch.randn(1, 30, 9), queries=torch.randn(1, 4, 14))
