"""Small models: when one op stands in for several layers, and that it makes no difference but rounding."""

from contextlib import nullcontext

import pytest
import torch
from support import needs_extension, relative_error
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import perceiver_fast as pf
from perceiver_fast.layers import small
from perceiver_fast.ops.declaration import OPERATORS
from perceiver_fast.ranges import OPS

pytestmark = pytest.mark.skipif(**needs_extension)

TOGETHER = {"grid_cross_attention", "latent_cross_attention", "latent_layers"}
OF_A_GRID = TOGETHER - {"latent_cross_attention"}
SIZES = dict(num_freq_bands=2, depth=2, max_freq=4.0, num_latents=5, latent_dim=16, latent_heads=2, latent_dim_head=4)


def model(**options):
    torch.manual_seed(0)
    return pf.Perceiver(**SIZES | dict(num_classes=3) | options)


def image(batch=2):
    return torch.randn(batch, 6, 5, 3, generator=torch.Generator().manual_seed(1))


def ops_of(call):
    """Names of the ops that run in a call."""
    with pf.ranges(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()} & OPS


def layer_by_layer(monkeypatch):
    monkeypatch.setattr(small, "are_few", lambda latents, channels: False)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(cross_heads=3, self_per_cross_attn=2, weight_tie_layers=True, depth=3),
        dict(num_latents=128),  # rows of 1,024 bytes, which are laid out apart
        dict(num_latents=500, cross_heads=2),
    ],
)
def test_results_are_those_of_layers(monkeypatch, options, masked, train):
    perceiver, data = model(**options).double(), image().double()
    mask = torch.rand(2, 30) > 0.5 if masked else None

    def results():
        with nullcontext() if train else torch.no_grad():
            out = perceiver(data, mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), perceiver.parameters())] if train else [out]

    found = results()
    assert ops_of(lambda: perceiver(data, mask=mask)) >= OF_A_GRID
    layer_by_layer(monkeypatch)
    assert not ops_of(lambda: perceiver(data, mask=mask)) & TOGETHER
    for mine, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "dropouts", [dict(ff_dropout=0.3), dict(ff_dropout=1.0), dict(ff_dropout=0.2, attn_dropout=0.4)]
)
def test_equal_seeds_drop_the_same_together_and_layer_by_layer(monkeypatch, dropouts):
    perceiver, data = model(**dropouts, depth=3, weight_tie_layers=True).double(), image().double()

    def results():
        torch.manual_seed(3)
        out = perceiver(data)
        return [out, *torch.autograd.grad(out.square().sum(), perceiver.parameters())]

    found = results()
    assert "latent_layers" in ops_of(lambda: perceiver(data))
    layer_by_layer(monkeypatch)
    for mine, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_perceiver_io_runs_together():
    io = pf.PerceiverIO(depth=2, dim=9, queries_dim=6, num_latents=8, latent_dim=16)
    ops = ops_of(lambda: io(torch.randn(2, 9, 9), queries=torch.randn(5, 6)))
    assert ops >= {"latent_layers", "layer_norm_linear", "latent_cross_attention"} and "cross_attention" not in ops


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def few_bands(dropout, bands=2):
    """One long axis, whose tokens are points: attention runs over their codes."""
    perceiver = model(input_axis=1, input_channels=1, attn_dropout=dropout, num_freq_bands=bands)
    return perceiver, lambda mask: perceiver(draw(2, 1100, 1), mask=mask), 1100


def many_bands(dropout):
    """The same with keys and values."""
    return few_bands(dropout, bands=60)


def dense(dropout):
    perceiver = model(fourier_encode_data=False, input_axis=1, input_channels=40, cross_heads=2, attn_dropout=dropout)
    return perceiver, lambda mask: perceiver(draw(2, 30, 40), mask=mask), 30


def learned(dropout):
    """Dense tokens that a layer before made."""
    perceiver, _, tokens = dense(dropout)
    perceiver.before = nn.Linear(40, 40)
    return perceiver, lambda mask: perceiver(perceiver.before(draw(2, 30, 40)), mask=mask), tokens


def described(dropout):
    """An image whose tokens pass through a layer, and whose raw channels learn."""
    embed = nn.Linear(13, 9)
    perceiver = pf.PerceiverIO(depth=1, dim=9, queries_dim=6, num_latents=5, latent_dim=16)
    perceiver.cross_attend_block.cross_attn.fn.dropout.p = dropout
    perceiver.embed = embed

    def call(mask):
        image = pf.grid_tokens((5, 6), feat=draw(2, 5, 6, 3), num_freq_bands=2, max_freq=4.0, embed=embed)
        return perceiver(image, mask=mask, queries=draw(7, 6))

    return perceiver, call, 30


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "kind, in_one",
    [
        (few_bands, "grid_cross_attention"),
        (many_bands, "latent_cross_attention"),
        (dense, "grid_cross_attention"),
        (learned, "latent_cross_attention"),
        (described, "latent_layers"),
    ],
)
def test_tokens_of_every_kind(monkeypatch, kind, in_one, masked, dropout):
    """In one op or layer by layer; equal seeds drop the same."""
    perceiver, call, tokens = kind(dropout)
    perceiver.double()
    if dropout and in_one == "grid_cross_attention":
        in_one = "latent_layers"
    mask = draw(2, tokens) > -0.5 if masked else None

    def results():
        torch.manual_seed(4)
        out = call(mask)
        return [out, *torch.autograd.grad(out.square().sum(), [p for p in perceiver.parameters() if p.requires_grad])]

    found = results()
    assert in_one in ops_of(lambda: call(mask))
    layer_by_layer(monkeypatch)
    assert not ops_of(lambda: call(mask)) & TOGETHER
    for mine, theirs in zip(found, results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_tokens_whose_product_a_library_makes_in_half_precision_run_one_by_one():
    io = pf.PerceiverIO(depth=1, dim=256, queries_dim=6, num_latents=64, latent_dim=16)
    few, many = torch.randn(1, 50, 256), torch.randn(1, 900, 256)
    few, many = few.requires_grad_(), many.requires_grad_()  # what does not learn needs no keys and values
    for data, dtype in ((few, torch.float32), (many, torch.float32), (few, torch.bfloat16)):
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            assert "latent_cross_attention" in ops_of(lambda: io(data))
    with torch.autocast("cpu", torch.bfloat16):
        assert "latent_cross_attention" not in ops_of(lambda: io(many))


def hooked(perceiver):
    perceiver.layers[0].self_attns[0][1].fn.net[0].register_forward_hook(lambda *_: None)
    perceiver.layers[0].cross_attn.fn.to_q.register_forward_hook(lambda *_: None)


def replaced(perceiver):
    perceiver.layers[0].cross_ff.norm = nn.Identity()
    perceiver.layers[0].cross_attn.norm_context = nn.Identity()


@pytest.mark.parametrize("change", [hooked, replaced])
def test_layers_that_are_more_than_their_parameters_run_one_by_one(change):
    perceiver = model(depth=1)
    change(perceiver)
    assert not ops_of(lambda: perceiver(image())) & TOGETHER


def test_modes_run_layers_one_by_one():
    perceiver, data = model(), image()
    with FlopCounterMode(display=False):
        assert not ops_of(lambda: perceiver(data)) & TOGETHER
    with pf.use_backend("reference"):
        assert not ops_of(lambda: perceiver(data)) & TOGETHER
    assert not ops_of(lambda: pf.explain(perceiver, data)) & TOGETHER
    assert not ops_of(lambda: torch.func.vmap(lambda x: perceiver(x.unsqueeze(0)))(data)) & TOGETHER
    assert "grid_cross_attention" not in ops_of(lambda: perceiver(data.clone().requires_grad_()))


def test_a_graph_has_the_layers_ops():
    program = torch.export.export(model().eval(), (image(),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any(name in target for target in targets for name in OPERATORS if name.startswith(tuple(TOGETHER)))


@pytest.mark.parametrize("weights", [False, True], ids=["autocast", "bfloat16 weights"])
def test_half_precision_is_computed_in_float32(monkeypatch, weights):
    """Outputs and gradients are of the dtypes that they have layer by layer, and nearer to float64."""
    perceiver, given = (model().bfloat16(), image().bfloat16()) if weights else (model(), image())
    exact = model().double()
    exact.load_state_dict(perceiver.state_dict())

    def results(perceiver, data, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = perceiver(data)
        return [out, *torch.autograd.grad(out.double().square().sum(), perceiver.parameters())]

    found = results(perceiver, given, not weights)
    assert ops_of(lambda: results(perceiver, given, not weights)) >= OF_A_GRID
    want = results(exact, given.double(), False)
    layer_by_layer(monkeypatch)
    for mine, theirs, true in zip(found, results(perceiver, given, not weights), want, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, true) <= relative_error(theirs, true) + 4e-3


def test_wide_latents_in_half_precision_run_one_by_one():
    wide = dict(num_latents=128, latent_dim=256)
    perceiver, data = model(**wide).eval(), image(4)
    assert ops_of(lambda: perceiver(data)) >= OF_A_GRID
    with torch.autocast("cpu", torch.bfloat16):
        assert not ops_of(lambda: perceiver(data)) & TOGETHER


def test_a_share_that_attention_refuses_is_refused():
    perceiver = model()
    for module in perceiver.modules():
        if type(module).__name__ == "Attention":
            module.dropout.p = -0.1
    with pytest.raises((ValueError, RuntimeError), match="dropout probability"):
        perceiver(image())


def test_where_torch_s_attention_drops_half_precision_runs_layer_by_layer(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    perceiver, data = model(attn_dropout=0.4), image()
    with torch.autocast("cpu", torch.bfloat16):
        names = ops_of(lambda: perceiver(data))  # the feed-forward after the cross-attention has no attention beside it
        assert "self_attention" in names
    assert "self_attention" not in ops_of(lambda: perceiver(data))


def test_noise_is_saved_as_tensors_are():
    """What dropout drew goes through hooks of saved tensors, and is not to be changed before the backward."""
    perceiver, data = model(ff_dropout=0.5, depth=1), image()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        perceiver(data)
    assert seen.count(torch.Size([2, 5, 16])) >= 2


@pytest.mark.parametrize("last", [nn.Identity, lambda: nn.Dropout(0.0)])
def test_the_head_s_norm_keeps_the_dtype_of_latents(last):
    perceiver = model()
    perceiver.to_logits[-1] = last()
    with torch.autocast("cpu", torch.bfloat16):
        assert perceiver(image()).dtype is torch.float32
    assert perceiver.bfloat16()(image().bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("rows", [7, 5000], ids=["few queries", "many"])
def test_what_is_not_added_has_the_dtype_of_a_product(rows):
    """A layer alone, and a decoder without a last one, under autocast: whatever their size."""
    io = pf.PerceiverIO(depth=1, dim=9, queries_dim=24, num_latents=5, latent_dim=16)
    layer = io.decoder_cross_attn
    x, context = torch.randn(2, rows, 24), torch.randn(2, 5, 16)
    assert layer(x, context=context).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, context=context).dtype is torch.bfloat16
        assert io(torch.randn(2, 30, 9), queries=x[0]).dtype is torch.bfloat16


def test_mostly_raw_channels_of_another_dtype_than_the_weights():
    wide = pf.Perceiver(**SIZES | dict(input_axis=1, input_channels=90, cross_heads=2, num_classes=3))
    layer = wide.layers[0].cross_attn
    tokens = wide.describe(torch.randn(2, 40, 90))
    assert tokens.half_product
    expected = tokens.keys_values(layer.fn.to_kv, layer.norm_context)
    given = wide.bfloat16().describe(tokens.feat.bfloat16())
    found = given.keys_values(wide.float().layers[0].cross_attn.fn.to_kv, layer.norm_context)
    assert relative_error(found, expected) < 2e-2
