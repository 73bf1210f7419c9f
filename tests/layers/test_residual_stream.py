"""The residual stream against plain additions, and layers that do more than their parameters show."""

import pytest
import torch
from support import relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.layers import Attention, FeedForward, PerceiverBlock, PreNorm
from perceiver_fast.layers.fusing import is_plain
from perceiver_fast.layers.pre_norm import add_layer
from perceiver_fast.layers.residual_stream import ResidualStream


def layers(dim=16):
    torch.manual_seed(0)
    return [PreNorm(dim, Attention(dim, heads=2, dim_head=8)), PreNorm(dim, FeedForward(dim))]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch", [1, 3])
def test_is_plain_addition(batch, backend):
    x = torch.randn(batch, 5, 16, dtype=torch.float64, requires_grad=True)
    some = [layer.double() for layer in layers()]
    with pf.use_backend(backend):
        plain = x
        for layer in some:
            plain = plain + layer(plain)
        stream = ResidualStream(x)
        for layer in some:
            add_layer(stream, layer, watched=False)
        assert stream.shape == x.shape
        value = stream.value()
        assert value is stream.value()
    assert relative_error(value, plain) < 1e-12
    wanted = [x, *(p for layer in some for p in layer.parameters())]
    cotangent = torch.randn_like(plain)
    for mine, theirs in zip(*(torch.autograd.grad(out, wanted, cotangent) for out in (value, plain))):
        assert relative_error(mine, theirs) < 1e-10


def test_shared_latents_meet_a_batch():
    x, branch, bias = torch.randn(1, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    stream = ResidualStream(x.expand(3, -1, -1))
    assert stream.shape == x.shape and stream.value().shape == branch.shape
    stream.add(branch, bias)
    norm = nn.LayerNorm(8)
    assert relative_error(stream.normalized(norm), norm(x + branch + bias)) < 1e-6
    stream.add(branch)
    assert relative_error(stream.value(), x + 2 * branch + bias) < 1e-6


def test_the_stream_keeps_float32_under_autocast():
    stream = ResidualStream(torch.randn(2, 4, 16))
    with torch.autocast("cpu", torch.bfloat16):
        for layer in layers():
            add_layer(stream, layer, watched=False)
        assert stream.normalized(nn.LayerNorm(16)).dtype == torch.bfloat16
        assert stream.value().dtype == torch.float32


def test_latents_shown_transposed_are_not_taken_for_themselves():
    block, latents = PerceiverBlock(dim=8, context_dim=9).eval(), nn.Parameter(torch.randn(8, 8))
    tokens = torch.randn(1, 30, 9)
    with torch.no_grad():
        shown = [block(x.unsqueeze(0), tokens) for x in (latents, latents.T, latents)]
        apart = [block(x.clone().unsqueeze(0), tokens) for x in (latents, latents.T, latents)]
    for mine, theirs in zip(shown, apart):
        assert relative_error(mine, theirs) < 1e-6


def run(block, x):
    with torch.no_grad():
        return block(x)


def test_hooks_are_called():
    """A hook on a linear layer or a norm sees its call, and may change the result."""
    block, x, calls = PerceiverBlock(dim=16, has_cross_attn=False).eval(), torch.randn(2, 5, 16), []
    before = run(block, x)
    attn, ff = block.self_attns[0]
    for module in (attn.norm, attn.fn.to_q, attn.fn.to_kv, attn.fn.to_out, ff.norm, ff.fn.net[0], ff.fn.net[2]):
        handle = module.register_forward_hook(lambda m, i, o: calls.append(m))
        assert not is_plain(module, type(module))
        assert relative_error(run(block, x), before) < 1e-5 and calls == [module]
        calls.clear()
        handle.remove()
        handle = module.register_forward_hook(lambda m, i, o: o * 2)
        assert relative_error(run(block, x), before) > 1e-3
        handle.remove()

    for module in (ff.fn.net, ff.fn.net[1], ff.fn.net[3]):
        handle = module.register_forward_hook(lambda m, i, o: calls.append(m))
        assert relative_error(run(block, x), before) < 1e-5 and calls == [module]
        calls.clear()
        handle.remove()


def test_a_forward_put_on_a_layer_is_called():
    """accelerate puts a forward on the instance, which first brings weights from elsewhere."""
    block, x = PerceiverBlock(dim=16, has_cross_attn=False).eval(), torch.randn(2, 5, 16)
    before = run(block, x)
    attn, ff = block.self_attns[0]
    for module in (attn.norm, attn.fn.to_q, attn.fn.to_kv, attn.fn.to_out, ff.norm, ff.fn.net[0], ff.fn.net[2]):
        module.forward = lambda x, layer=module: 2 * type(layer).forward(layer, x)
        assert relative_error(run(block, x), before) > 1e-3
        del module.forward
    assert relative_error(run(block, x), before) == 0


@pytest.mark.parametrize("which", [0, 2])
def test_a_feed_forward_may_go_without_a_bias(which):
    block, x = PerceiverBlock(dim=16, has_cross_attn=False).eval(), torch.randn(2, 5, 16)
    linear = block.self_attns[0][1].fn.net[which]
    with torch.no_grad():
        linear.bias.zero_()
    before = run(block, x)
    linear.bias = None
    assert relative_error(run(block, x), before) < 1e-5


class Adapted(nn.Linear):
    """A linear layer with a low-rank adapter, as fine-tuning libraries put in the place of nn.Linear."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = nn.Parameter(torch.randn(2, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def merged(adapted):
    """A plain linear layer that computes the same as an adapted one."""
    plain = nn.Linear(adapted.in_features, adapted.out_features, adapted.bias is not None)
    plain.load_state_dict({k: v for k, v in adapted.state_dict().items() if k in ("weight", "bias")})
    with torch.no_grad():
        plain.weight += adapted.up @ adapted.down
    return plain


def test_adapters_are_called():
    torch.manual_seed(0)
    x, block = torch.randn(2, 5, 16), PerceiverBlock(dim=16, has_cross_attn=False).eval()
    results = []
    for put in (Adapted, merged):
        attn, ff = (layer.fn for layer in block.self_attns[0])
        attn.to_q, attn.to_kv, attn.to_out = put(attn.to_q), put(attn.to_kv), put(attn.to_out)
        ff.net[0], ff.net[2] = put(ff.net[0]), put(ff.net[2])
        results.append(run(block, x))
    assert relative_error(*results) < 1e-4


def test_parametrizations_are_seen():
    block, x = PerceiverBlock(dim=16, has_cross_attn=False).eval(), torch.randn(2, 5, 16)
    before = run(block, x)
    linear = block.self_attns[0][1].fn.net[0]
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Hardtanh(-0.01, 0.01))
    assert relative_error(run(block, x), before) > 1e-3
    with torch.no_grad():
        expected = PerceiverBlock(dim=16, has_cross_attn=False).eval()
        state = {k.replace("parametrizations.", "").replace(".original", ""): v for k, v in block.state_dict().items()}
        name = "self_attns.0.1.fn.net.0.weight"
        state = {k.replace("weight.original", "weight"): v for k, v in state.items()} | {name: linear.weight}
        expected.load_state_dict(state)
    assert relative_error(run(block, x), run(expected, x)) < 1e-6


class Opaque(nn.Module):
    """A layer that has no attribute ``weight``, as quantization makes them."""

    def __init__(self, layer):
        super().__init__()
        self.call = layer.forward

    def forward(self, x):
        return self.call(x)


def test_opaque_layers_are_called():
    block, x = PerceiverBlock(dim=16, has_cross_attn=False).eval(), torch.randn(2, 5, 16)
    before = run(block, x)
    attn, ff = (layer.fn for layer in block.self_attns[0])
    attn.to_q, attn.to_kv, attn.to_out = Opaque(attn.to_q), Opaque(attn.to_kv), Opaque(attn.to_out)
    ff.net[0], ff.net[2] = Opaque(ff.net[0]), Opaque(ff.net[2])
    assert relative_error(run(block, x), before) < 1e-5
