"""attention_map against explicit attention in float64: every model, kind of tokens and layer."""

import sys

import perceiver_pytorch
import plain_multimodal
import pytest
import torch
import torch.nn.functional as F
from attention_cases import DENSE, GRID, IMAGE, IO, MODALITIES, in_float64, randn
from perceiver_pytorch import experimental as their_experimental
from perceiver_pytorch import gated as their_gated
from perceiver_pytorch import mixed_latents as their_mixed_latents
from support import relative_error

import perceiver_fast as pf
from perceiver_fast import reference
from perceiver_fast.layers import Attention
from perceiver_fast.layers.pre_norm import is_cross_attention
from perceiver_fast.models import perceiver_io
from perceiver_fast.tokens import DenseTokens, PointTokens, TokenGroups

MAP = sys.modules["perceiver_fast.insight.attention_map"]  # the package has a function of this name
LM = {k: v for k, v in IO.items() if k not in ("queries_dim", "logits_dim")} | dict(num_tokens=20, max_seq_len=30)
SOUND, IDS = (23, 9), torch.randint(0, 20, (3, 23))
BLOCK = dict(dim=16, context_dim=9, cross_heads=2, cross_dim_head=5, latent_heads=2, latent_dim_head=4)


def random_mask(*shape):
    """The last batch element is masked altogether."""
    mask = torch.rand(*shape) > 0.4
    mask[-1] = False
    return mask


def pair(theirs, ours, arguments):
    theirs, ours = in_float64(theirs(**arguments)), ours(**arguments).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def explicit(module, x, context=None, mask=None, inverted_attention=False):
    """Weights ``[B, H, N, M]`` of perceiver-pytorch's Attention called with these."""
    tokens = x if context is None else context
    if context is not None and getattr(module, "queries_contribute_kv", False):
        tokens = torch.cat([x, context], 1)
        mask = None if mask is None else torch.cat([mask.new_ones(x.shape[:2]), mask.flatten(1)], 1)
    q, k = (
        t.unflatten(-1, (module.heads, -1)).transpose(1, 2)
        for t in (module.to_q(x), module.to_kv(tokens).chunk(2, -1)[0])
    )
    logits = q @ k.mT * module.scale
    if mask is not None:
        logits = logits.masked_fill(~mask.flatten(1)[:, None, None], -torch.finfo(logits.dtype).max)
    if not inverted_attention:
        return logits.softmax(-1)
    weights = logits.softmax(-2)
    weights = weights if mask is None else weights.masked_fill(~mask.flatten(1)[:, None, None], 0.0)
    return F.normalize(weights, p=1, dim=-1, eps=1e-8)


def their_weights(theirs, *args, **kwargs):
    """Weights of all attention layers of perceiver-pytorch's model by the names they have here, in the order they run."""
    names, found = {}, {}
    for name, module in theirs.named_modules(remove_duplicate=False):
        if type(module).__name__ == "Attention":
            names.setdefault(module, []).append(name)

    def catch(module, args, kwargs):
        name = names[module].pop(0)
        is_cross = "context" in kwargs
        found[name.removesuffix(".fn") if is_cross else name] = explicit(module, *args, **kwargs)

    handles = [module.register_forward_pre_hook(catch, with_kwargs=True) for module in names]
    torch.set_default_dtype(torch.float64)  # of the variants' positions
    try:
        with torch.no_grad():
            theirs(*args, **kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
        for handle in handles:
            handle.remove()
    return found


def grid_case(theirs, ours, sizes=IMAGE, masked=False, **extra):
    def case():
        arguments = GRID | dict(input_axis=len(sizes) - 1, input_channels=sizes[-1]) | extra
        return (
            *pair(theirs, ours, arguments),
            randn(3, *sizes),
            dict(mask=random_mask(3, *sizes[:-1])) if masked else {},
        )

    return case


def perceiver(**extra):
    return grid_case(perceiver_pytorch.Perceiver, pf.Perceiver, **extra)


def io(masked=False, **extra):
    def case():
        call = dict(queries=randn(11, 6)) | (dict(mask=random_mask(3, 23)) if masked else {})
        return *pair(perceiver_pytorch.PerceiverIO, pf.PerceiverIO, IO | extra), randn(*DENSE), call

    return case


def lm():
    return *pair(perceiver_pytorch.PerceiverLM, pf.PerceiverLM, LM), IDS, dict(mask=random_mask(3, 23))


def block(masked=False, inverted=False, **extra):
    def case():
        theirs, ours = pair(perceiver_pytorch.PerceiverBlock, pf.PerceiverBlock, BLOCK | extra)
        call = dict(context=randn(3, 23, extra.get("context_dim", 9)), inverted_attention=inverted)
        return theirs, ours, randn(3, 7, 16), call | (dict(mask=random_mask(3, 23)) if masked else {})

    return case


def experimental():
    arguments = GRID | dict(fourier_encode_data=False, input_channels=9, weight_tie_layers=True)
    return *pair(their_experimental.Perceiver, pf.experimental.Perceiver, arguments), randn(3, 5, 6, 9), {}


CASES = {
    "image": perceiver(),
    "image, masked": perceiver(masked=True),
    "image, tied": perceiver(weight_tie_layers=True, self_per_cross_attn=2),
    "image, inverted": perceiver(inverted_cross_attn=(True, False, True)),
    "image, inverted and masked": perceiver(inverted_cross_attn=True, masked=True),
    "image, residual": perceiver(attn_residual=True),
    "video": perceiver(sizes=(3, 4, 5, 2), masked=True),
    "sound": perceiver(sizes=SOUND),
    "dense": perceiver(fourier_encode_data=False, masked=True),
    "dense, inverted": perceiver(fourier_encode_data=False, masked=True, inverted_cross_attn=True),
    "io": io(),
    "io, masked, inverted, tied": io(masked=True, inverted_cross_attn=True, weight_tie_layers=True),
    "lm": lm,
    "block": block(),
    "block, masked, inverted": block(masked=True, inverted=True),
    "block, queries contribute": block(masked=True, context_dim=16, queries_contribute_kv=True),
    "gated": grid_case(their_gated.Perceiver, pf.gated.Perceiver, masked=True),
    "mixed latents": grid_case(their_mixed_latents.Perceiver, pf.mixed_latents.Perceiver, masked=True),
    "experimental": experimental,
}


@pytest.mark.parametrize("piece", [MAP.PIECE, 4])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_of_every_model(name, piece, monkeypatch):
    monkeypatch.setattr(MAP, "PIECE", piece)  # tokens at once
    theirs, ours, data, call = CASES[name]()
    expected = their_weights(theirs, data, **call)
    modules = dict(ours.named_modules(remove_duplicate=False))
    crosses = [layer for layer in expected if is_cross_attention(modules[layer])]
    assert (
        len(expected) >= 2
        and crosses
        and all(isinstance(modules[layer], Attention) or is_cross_attention(modules[layer]) for layer in expected)
    )
    for layer, weights in expected.items():
        chosen = [weights.shape[2] - 1, 0, 2]
        actual = pf.attention_map(ours, data, layer, chosen, **call)
        assert relative_error(actual.reshape(weights[:, :, chosen].shape), weights[:, :, chosen]) < 1e-12, layer
        if layer in crosses:
            assert torch.equal(pf.attention_map(ours, data, crosses.index(layer), chosen, **call), actual)
            own = weights.shape[-1] == data.shape[1:-1].numel() > 1 and data.is_floating_point()
            assert actual.shape[3:] == (data.shape[1:-1] if own else weights.shape[3:]), layer


def test_weights_are_those_that_run():
    """The means of values that the weights make are the layer's own output, in float32 and bfloat16 too."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        model = in_float64(pf.Perceiver(**GRID)).to(dtype)
        layer = model.layers[0].cross_attn
        data = torch.randn(2, *IMAGE).to(dtype)
        tokens = model.describe(data)
        maps = pf.attention_map(model, data, latents=range(7)).flatten(3)
        assert maps.dtype == torch.float32
        values = layer.fn.split_heads(tokens.keys_values(layer.fn.to_kv, layer.norm_context).chunk(2, -1)[1])
        out = layer.fn.to_out((maps.to(dtype) @ values).transpose(1, 2).flatten(2))
        assert relative_error(out, layer(model.latents.unsqueeze(0), context=tokens)) < bound


def encoded_pair(axes):
    """Ours of points and perceiver-pytorch's of the same points encoded beforehand."""
    arguments = GRID | dict(input_axis=axes, input_channels=2)
    ours = in_float64(pf.Perceiver(**arguments))
    width = ours.input_dim
    theirs = perceiver_pytorch.Perceiver(
        **arguments | dict(input_channels=width, input_axis=1, fourier_encode_data=False)
    )
    theirs.double().load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_points(axes, masked):
    theirs, ours = encoded_pair(axes)
    data, coords = randn(2, 40, 2), torch.rand(2, 40, axes, dtype=torch.float64) * 2 - 1
    mask = dict(mask=random_mask(2, 40)) if masked else {}
    frequencies = torch.linspace(1, 5, 4, dtype=torch.float64).expand(axes, -1)
    codes = reference.fourier_encode(coords, frequencies)
    for index, weights in enumerate(
        w for n, w in their_weights(theirs, torch.cat([data, codes], -1), **mask).items() if "cross" in n
    ):
        actual = pf.attention_map(ours, data, index, [6, 1], coords=coords, **mask)
        assert actual.shape == (2, 2, 2, 40)
        assert relative_error(actual, weights[:, :, [6, 1]]) < 1e-12
    shared = pf.attention_map(ours, data, coords=coords[0], latents=[3])
    assert (
        relative_error(shared, pf.attention_map(ours, data, coords=coords[:1].expand(2, -1, -1), latents=[3])) < 1e-12
    )


def test_long_sound_is_points():
    theirs, ours = pair(perceiver_pytorch.Perceiver, pf.Perceiver, GRID | dict(input_axis=1, input_channels=2))
    data = randn(1, 1100, 2)
    assert isinstance(ours.describe(data), PointTokens)
    expected = their_weights(theirs, data)["layers.1.cross_attn"]
    actual = pf.attention_map(ours, data, 1, [4])
    assert actual.shape == (1, 2, 1, 1100) and relative_error(actual, expected[:, :, [4]]) < 1e-12


def multimodal_weights(model, data, mask):
    """Weights of every cross-attention over all tokens joined, from the plain statement of the model."""
    caught, plain = [], plain_multimodal.cross_attention

    def catch(module, x, groups, joined):
        fn, tokens = module.fn, torch.cat(groups, 1)
        q = fn.split_heads(fn.to_q(module.norm(x)))
        k = fn.split_heads(fn.to_kv(module.norm_context(tokens)).chunk(2, -1)[0])
        logits = q @ k.mT * fn.dim_head**-0.5
        if joined is not None:
            logits = logits.masked_fill(~joined[:, None, None], -torch.finfo(logits.dtype).max)
        caught.append(logits.softmax(-1).split([group.shape[1] for group in groups], -1))
        return plain(module, x, groups, joined)

    plain_multimodal.cross_attention = catch
    try:
        plain_multimodal.forward(model, data, mask)
    finally:
        plain_multimodal.cross_attention = plain
    return caught


@pytest.mark.parametrize("masked", [False, True])
def test_modalities_sum_to_one_together(masked):
    keywords = {k: v for k, v in GRID.items() if k not in ("num_freq_bands", "max_freq")}
    model = in_float64(pf.MultimodalPerceiver(MODALITIES, weight_tie_layers=True, **keywords))
    data = {
        "cloud": (randn(2, 13, 0), torch.rand(2, 13, 3, dtype=torch.float64)),
        "video": randn(2, 2, 3, 4, 3),
        "audio": randn(2, 23, 1),
    }
    mask = None
    if masked:  # the second batch element has no sound at all, the first nothing at all
        mask = {"video": torch.rand(2, 2, 3, 4) > 0.4, "audio": torch.zeros(2, 23, dtype=torch.bool)}
        mask["video"][0] = False
        mask["cloud"] = torch.tensor([False, True])[:, None].expand(2, 13)
    for index, expected in enumerate(multimodal_weights(model, data, mask)):
        maps = pf.attention_map(model, data, index, [2, 5], mask)
        assert [*maps] == ["video", "audio", "cloud"]
        assert maps["video"].shape == (2, 2, 2, 2, 3, 4) and maps["cloud"].shape == (2, 2, 2, 13)
        for actual, weights in zip(maps.values(), expected):
            assert relative_error(actual.flatten(3), weights[:, :, [2, 5]]) < 1e-12
        total = sum(part.flatten(3).sum(-1) for part in maps.values())
        assert relative_error(total, torch.ones_like(total)) < 1e-12
    without = pf.attention_map(model, {"audio": data["audio"]}, latents=[1])
    assert [*without] == ["audio"] and relative_error(without["audio"].sum(-1), torch.ones(2, 2, 1)) < 1e-12
    assert pf.attention_map(model, data, "layers.1.self_attns.0.0.fn").shape == (2, 2, 7, 7)


def test_groups_without_names():
    model = pf.PerceiverBlock(dim=16, context_dim=9)
    x, groups = torch.randn(2, 7, 16), [torch.randn(2, 5, 9), torch.randn(2, 8, 9)]
    maps = pf.attention_map(model, x, context=TokenGroups([DenseTokens(group) for group in groups]), heads="mean")
    joined = pf.attention_map(model, x, context=torch.cat(groups, 1), heads="mean")
    assert relative_error(torch.cat([maps[0], maps[1]], -1), joined) < 1e-6
    with pytest.raises(ValueError, match="plain attention to groups"):
        pf.attention_map(model, x, context=TokenGroups([DenseTokens(groups[0])]), inverted_attention=True)


def test_decoder_in_parts(monkeypatch):
    monkeypatch.setattr(perceiver_io, "DECODER_ROWS", 4)
    _, model, data, call = io()()
    chosen = [10, 0, 5, 5]
    parts = pf.attention_map(model, data, "decoder_cross_attn", chosen, **call)
    monkeypatch.undo()
    assert torch.equal(parts, pf.attention_map(model, data, 1, chosen, **call))
    assert len(pf.contrasting_latents(model, data, 1, 20, **call)) == 11
    with pytest.raises(IndexError, match=r"latents in 0\.\.10, got \[11\]"):
        pf.attention_map(model, data, 1, [3, 11], **call)
