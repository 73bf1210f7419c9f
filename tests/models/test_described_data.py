"""Described tokens as data: numbers are those of the tensor on every way, and who asks for a tensor gets one.

Random cases of data and queries against perceiver-pytorch are a part of the campaign, tests/campaign/described.py.
"""

import copy

import pytest
import torch
from support import needs_extension, relative_error
from torch import nn

import perceiver_fast as pf
from perceiver_fast.layers import PreNorm
from perceiver_fast.tokens import EmbeddedGrid, EmbeddedPoints

pytestmark = pytest.mark.skipif(**needs_extension)
CODES = dict(num_freq_bands=2, max_freq=4.0)


def points(batch=2, count=30, width=40, dtype=torch.float32, **changes):
    embed = nn.Linear(15, width, dtype=dtype)
    return pf.point_tokens(torch.rand(batch, count, 3) * 2 - 1, **CODES | dict(embed=embed) | changes)


def model_of(width=40, **changes):
    keywords = dict(depth=1, dim=width, queries_dim=10, logits_dim=3, num_latents=9, latent_dim=16, cross_heads=2)
    return pf.PerceiverIO(**keywords | dict(cross_dim_head=16, latent_heads=2, latent_dim_head=8) | changes)


def found_of(model, data, **inputs):
    """Way and op of the encoder's cross-attention."""
    (found,) = (row for row in pf.explain(model, data, **inputs).layers if row.layer == "cross_attend_block.cross_attn")
    return found


def test_explain_says_which_way_and_what_it_saves():
    """K and V of a vecset encoder: attention over the 51 channels of the codes, not over 512."""
    embed = nn.Linear(51, 512)
    data = pf.point_tokens(torch.rand(2048, 3), frequencies=2.0 ** torch.arange(8), layout="vecset", embed=embed)
    model = model_of(512, num_latents=512, latent_dim=512, cross_heads=1, cross_dim_head=512)
    found = found_of(model, data)
    assert (found.path, found.choice.op, found.choice.backend) == ("absorbed", "cross_attention", "cpu")
    built = found_of(model, data.tensor(model.latents))
    assert found.counts.multiply_adds < built.counts.multiply_adds / 2 < found.original.multiply_adds
    explained = pf.explain(model, data)
    assert "2048 described tokens of 512 channels" in explained.tokens
    assert explained.inputs == () or explained.inputs[0].original.multiply_adds >= 2048 * 51 * 512
    grid = pf.grid_tokens((64, 64), **CODES, embed=nn.Linear(10, 40))
    assert found_of(model_of(), grid).path == "grid"


def test_one_description_is_data_and_queries():
    data = points(width=10)
    model = model_of(10)
    assert model(data, queries=data).shape == (2, 30, 3)
    tensor = data.tensor(model.latents)
    torch.testing.assert_close(model(data, queries=data), model(tensor, queries=tensor))


def test_layers_take_a_description_for_a_context():
    data = points()
    tensor, x, mask = data.tensor(torch.empty(0)), torch.randn(2, 9, 16), torch.rand(2, 30) > 0.5
    block = pf.PerceiverBlock(dim=16, context_dim=40)
    torch.testing.assert_close(block(x, data, mask=mask), block(x, tensor, mask=mask))
    torch.testing.assert_close(block(x, context=data), block(x, context=tensor))
    layer = block.cross_attn
    assert type(layer) is PreNorm
    torch.testing.assert_close(layer(x, context=data, mask=mask), layer(x, context=tensor, mask=mask))
    for one in (points(1), pf.grid_tokens((3, 10), num_freq_bands=2, max_freq=4.0, embed=nn.Linear(10, 40))):
        expected = layer(x, context=one.tensor(x).expand(2, -1, -1))
        torch.testing.assert_close(layer(x, context=one), expected)  # shared by the batch
        torch.testing.assert_close(layer(x[:1], context=one), expected[:1])
    with pytest.raises(ValueError, match=r"expected context of 40 channels \(context_dim=40\), got 15"):
        block(x, pf.point_tokens(torch.rand(2, 30, 3), **CODES))
    with pytest.raises(ValueError, match="expected context for a batch of 2, got coords"):
        layer(x, context=points(3))
    with pytest.raises(ValueError, match=r"expected mask of shape \(2, 30\)"):
        layer(x, context=data, mask=mask[:, 1:])


def test_modules_that_are_more_than_their_parameters_are_called():
    data = points()
    model = model_of()
    expected, seen = model(data), []
    for module, width in (
        (model.cross_attend_block.cross_attn.norm_context, 40),
        (model.cross_attend_block.cross_attn.fn.to_kv, 64),
        (data.embed, 40),
    ):
        handle = module.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        torch.testing.assert_close(model(data), expected)
        assert seen.pop() == (2, 30, width)
        handle.remove()
    data.embed.register_forward_hook(lambda module, args, out: out * 2 + 1)
    torch.testing.assert_close(model(data), model(data.tensor(model.latents)))
    assert "tokens that are built (embed has a hook) are no grid" in str(found_of(model, data).choice.rejected)

    class Adapter(nn.Module):  # as LoRA's
        def __init__(self, inner):
            super().__init__()
            self.inner, self.more = inner, nn.Linear(40, 64)

        def forward(self, x):
            return self.inner(x) + self.more(x)

    fn = model.cross_attend_block.cross_attn.fn
    fn.to_kv = Adapter(fn.to_kv)
    torch.testing.assert_close(model(data), model(data.tensor(model.latents)))


def test_tokens_left_out_are_those_of_the_tensor():
    data, model = points(), model_of(seq_dropout_prob=0.5).train()
    found = []
    for given in (data, data.tensor(model.latents)):
        torch.manual_seed(3)
        found.append(model(given))
    torch.testing.assert_close(*found)


def test_an_embedding_of_few_channels_is_built():
    """Eight channels cost less than the codes' fifteen."""
    data = points(width=8)
    assert "built as they have no more channels" in str(found_of(model_of(8), data).choice.rejected)
    assert isinstance(points().describe(torch.empty(0)), EmbeddedPoints)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_tensor(dtype):
    model = model_of()
    grid = pf.grid_tokens((5, 6), **CODES, embed=nn.Linear(10, 40))
    assert isinstance(grid.describe(torch.empty(0)), EmbeddedGrid)
    for data in (points(), grid):
        expected = model(data)
        with torch.autocast("cpu", dtype):
            assert relative_error(model(data), expected) < 0.02
        half, embed = copy.deepcopy(model).to(dtype), copy.deepcopy(data.embed).to(dtype)
        out = half(type(data)(**vars(data) | {"embed": embed}))
        assert out.dtype == dtype and relative_error(out, expected) < 0.03


@pytest.mark.parametrize("kind", ["points", "embedded points", "grid", "embedded grid"])
def test_attention_maps_are_those_of_the_tensors(kind):
    """Of the encoder and of the decoder, both described."""
    layout = dict(layout="vecset")
    if kind.endswith("points"):
        data = points(width=40, **layout) if kind.startswith("e") else points(embed=None, **layout)
    else:
        embed = nn.Linear(10, 40) if kind.startswith("e") else None
        data = pf.grid_tokens((5, 6), **CODES, **layout, embed=embed)
    model, queries = model_of(data.channels), pf.grid_tokens((3, 4), **CODES, **layout)
    like, inputs = model.latents, dict(latents=[0, 3, 7])
    built = data.tensor(like)
    maps = pf.attention_map(model, data, 0, queries=queries, **inputs)
    expected = pf.attention_map(model, built, 0, queries=queries.tensor(like), **inputs)
    assert maps.shape[3:] == ((30,) if kind.endswith("points") else (5, 6))
    torch.testing.assert_close(maps.flatten(3), expected)
    decoder = pf.attention_map(model, data, "decoder_cross_attn", queries=queries, **inputs)
    expected = pf.attention_map(model, built, "decoder_cross_attn", queries=queries.tensor(like), **inputs)
    assert decoder.shape == (len(built), 2, 3, 9)
    torch.testing.assert_close(decoder, expected)
    assert len(pf.contrasting_latents(model, data, queries=queries, count=2)) == 2


class Shapes(nn.Module):
    """A vecset autoencoder: points in, a field out; it makes both descriptions in its forward."""

    def __init__(self):
        super().__init__()
        self.embed, self.model = nn.Linear(15, 24), model_of(24, queries_dim=24)

    def forward(self, coords):
        queries = pf.grid_tokens((3, 4, 2), **CODES, embed=self.embed)
        return self.model(pf.point_tokens(coords, **CODES, embed=self.embed), queries=queries)


def gradients(shapes, call, coords):
    out = call(coords)
    return out.detach(), torch.autograd.grad(out.square().sum(), list(shapes.parameters()))


def agree(found, expected):
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


def test_compiled_exported_and_transformed():
    torch.use_deterministic_algorithms(False)  # inductor's own code has no use for NaN-filled memory
    shapes, coords = Shapes(), torch.rand(2, 30, 3) * 2 - 1
    out, grads = gradients(shapes, shapes, coords)
    torch._dynamo.reset()
    compiled_out, compiled = gradients(shapes, torch.compile(shapes, fullgraph=True, backend="aot_eager"), coords)
    agree([compiled_out, *compiled], [out, *grads])

    dims = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("points", min=2, max=4096)}
    exported = torch.export.export(shapes, (coords,), dynamic_shapes={"coords": dims}).module()
    other = torch.rand(5, 17, 3)
    agree([exported(other)], [shapes(other)])

    parameters = dict(shapes.named_parameters())

    def loss(parameters, coords):
        return torch.func.functional_call(shapes, parameters, (coords.unsqueeze(0),)).square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, coords)
    agree([each[name].sum(0) for name in parameters], grads)


def test_compiled_models_take_descriptions():
    """As arguments, and other positions do not compile it anew."""
    data, model = points(), model_of()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):
        given = pf.point_tokens(torch.rand(2, 30, 3), **CODES, embed=data.embed)
        queries = pf.grid_tokens((3, 4), **CODES)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            agree([compiled(given, queries=queries)], [model(given, queries=queries)])


def test_a_second_derivative_is_that_of_the_tensor():
    model = model_of(14, num_latents=5).double()
    embed = nn.Linear(10, 14, dtype=torch.float64)
    for data in (
        pf.grid_tokens((3, 4), **CODES, embed=embed),
        pf.point_tokens(torch.rand(9, 2, dtype=torch.float64), **CODES, embed=embed),
    ):
        found = []
        for given in (data, data.tensor(model.latents)):
            leaves = [embed.weight, embed.bias, model.latents]
            first = torch.autograd.grad(model(given).square().sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
        for ours, expected in zip(*found):
            torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


def test_positions_made_in_inference_mode_serve_in_training():
    embed, model = nn.Linear(15, 40), model_of()
    with torch.inference_mode():
        coords = torch.rand(2, 30, 3, dtype=torch.float64)
    model(pf.point_tokens(coords, **CODES, embed=embed)).sum().backward()
    assert embed.weight.grad.isfinite().all()


def test_wrong_descriptions_are_told():
    model = model_of()
    with pytest.raises(ValueError, match=r"expected data of 40 channels \(dim=40\), got 15; change their frequencies"):
        model(points(embed=None))
    with pytest.raises(ValueError, match="expected data for a batch of 2, got coords"):
        model(points(3, feat=torch.randn(2, 30, 5), embed=nn.Linear(20, 40)))
    with pytest.raises(ValueError, match="expected queries for a batch of 2, got coords"):
        model(points(), queries=pf.point_tokens(torch.rand(3, 7, 2), **CODES))
    with pytest.raises(TypeError, match="expected the weight of embed of data of dtype torch.float32"):
        model(points(embed=nn.Linear(15, 40, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"expected mask of shape \(2, 30\), got \(2, 29\)"):
        model(points(), mask=torch.ones(2, 29, dtype=torch.bool))
    assert model(points(), mask=torch.rand(2, 30) > 0.5).shape == (2, 9, 16)
